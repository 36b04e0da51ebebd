"""The work, by groups; each module offers `GROUPS`: a name, what it measures, and the function that does so."""
