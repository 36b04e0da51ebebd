"""cowdisk beside its peers: one file per peer in `peers/`, one per group of work in `work/`.

`host` runs programs and reads what they cost; `fio`, `qemu_img` and `requests` put load on a file; `results` holds what
came out and judges it; `report` and `plot` write it down; `bench` takes turns; `main` is the command line.
"""
