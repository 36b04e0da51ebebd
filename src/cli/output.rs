//! What goes to stdout: lines, tables and JSON; and how errors are shown on stderr.
//!
//! A reader who goes away (`cowdisk map … | head`) is no error: what is left to print is dropped. A stdout that cannot
//! be written for another reason fails the command.

use std::io::{self, BufWriter, ErrorKind as IoKind, Stdout, Write};

use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};

/// Stdout, buffered.
pub struct Output {
    stdout: BufWriter<Stdout>,
    /// Nobody reads any more.
    closed: bool,
}

impl Output {
    /// Takes stdout for itself.
    pub fn new() -> Self {
        Self { stdout: BufWriter::new(io::stdout()), closed: false }
    }

    /// Prints `text` as it is.
    ///
    /// # Errors
    /// If stdout cannot be written; not if its reader has gone.
    pub fn text(&mut self, text: &str) -> Result<()> {
        let written = if self.closed { Ok(()) } else { self.stdout.write_all(text.as_bytes()) };
        self.check(written)
    }

    /// Prints a line.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn line(&mut self, line: &str) -> Result<()> {
        self.text(line)?;
        self.text("\n")
    }

    /// Prints `value` as indented JSON.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn json(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Error::caused(ErrorKind::Invalid, "write JSON", error))?;
        self.line(&text)
    }

    /// Prints rows in aligned columns below `header`. The columns in `numbers` are aligned to the right.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn table(&mut self, header: &[&str], numbers: &[usize], rows: &[Vec<String>]) -> Result<()> {
        let mut widths: Vec<usize> = header.iter().map(|name| name.len()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
        for row in std::iter::once(&header).chain(rows) {
            self.row(&widths, numbers, row)?;
        }
        Ok(())
    }

    /// Prints properties of one thing, one a line, their values aligned.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn properties(&mut self, properties: &[(&str, String)]) -> Result<()> {
        let width = properties.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        properties.iter().try_for_each(|(name, value)| self.line(&format!("{name:<width$}  {value}")))
    }

    fn row(&mut self, widths: &[usize], numbers: &[usize], row: &[String]) -> Result<()> {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, &width))| {
            if numbers.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        self.line(line.trim_end())
    }

    /// Prints what is still held back.
    ///
    /// # Errors
    /// As [`Output::text`].
    pub fn flush(&mut self) -> Result<()> {
        let flushed = if self.closed { Ok(()) } else { self.stdout.flush() };
        self.check(flushed)
    }

    fn check(&mut self, result: io::Result<()>) -> Result<()> {
        match result {
            Err(error) if error.kind() == IoKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            result => result.map_err(|error| Error::io("write to stdout", error)),
        }
    }
}

/// Shows an error: `cowdisk: ` and its chain on one line, the hint, if any, on a second.
pub fn show_error(error: &Error) {
    let mut text = format!("cowdisk: {}\n", one_line(&without_numbers(&error.to_string())));
    if let Some(hint) = error.hint() {
        text += &one_line(hint);
        text.push('\n');
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// `message` without the ` (os error 2)` that the standard library puts behind the system's own words.
pub(super) fn without_numbers(message: &str) -> String {
    let mut parts = message.split(" (os error ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text += part.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start_matches(')');
    }
    text
}

/// `text` on one line: messages hold names that a user or a file chose, and no control character of theirs may reach
/// the terminal.
pub fn one_line(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_errors_are_not_shown() {
        assert_eq!(without_numbers("a: No such file (os error 2)"), "a: No such file");
        assert_eq!(without_numbers("a: x (os error 13): y (os error 2) z"), "a: x: y z");
        assert_eq!(without_numbers("(os error)"), "(os error)");
    }

    #[test]
    fn control_characters_are_shown_escaped() {
        assert_eq!(one_line("image \"ä\": \u{1b}[31m\nx"), "image \"ä\": \\u{1b}[31m\\nx");
    }
}
