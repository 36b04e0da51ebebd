//! A tree of XML elements: built by us for libvirt, or read from what libvirt tells.
//!
//! quick-xml escapes, indents and parses; this module refuses what XML cannot carry at all, such as a control
//! character in the name of a file. Text is written but not read: libvirt keeps in attributes whatever we ask for.

use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::{Reader, Writer, XmlVersion};

use crate::error::{Error, ErrorKind, Result};

/// One element: its name, attributes, and children or text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Element>,
    text: Option<String>,
}

impl Element {
    /// An empty element.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), attributes: Vec::new(), children: Vec::new(), text: None }
    }

    /// Adds an attribute.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.attributes.push((name.into(), value.into()));
        self
    }

    /// Adds a child after the others.
    #[must_use]
    pub fn child(mut self, child: Element) -> Self {
        self.children.push(child);
        self
    }

    /// Adds children after the others.
    #[must_use]
    pub fn children(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.children.extend(children);
        self
    }

    /// Adds a child that holds nothing but `text`.
    #[must_use]
    pub fn text_child(self, name: &str, text: impl Into<String>) -> Self {
        self.child(Element::new(name).text(text))
    }

    /// Sets the text; an element has text or children, not both.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Self {
        self.text = Some(text.into());
        self
    }

    /// The value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The first child of that name.
    pub fn find(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// All children of that name, in their order.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// The element as indented text that ends in a newline.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if a value holds a character that XML cannot carry.
    pub fn to_xml(&self) -> Result<String> {
        self.check()?;
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        self.write(&mut writer).map_err(|error| Error::io("write XML", error))?;
        let mut text = String::from_utf8(writer.into_inner())
            .map_err(|error| Error::caused(ErrorKind::Invalid, "write XML", error))?;
        text.push('\n');
        Ok(text)
    }

    fn check(&self) -> Result<()> {
        let values = self.attributes.iter().map(|(_, value)| value).chain(&self.text);
        for value in values {
            if let Some(bad) = value.chars().find(|&c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{value:?}: XML for libvirt cannot carry the character {bad:?}"),
                ));
            }
        }
        self.children.iter().try_for_each(Element::check)
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let mut start = BytesStart::new(self.name.as_str());
        for (name, value) in &self.attributes {
            start.push_attribute((name.as_str(), value.as_str()));
        }
        if self.children.is_empty() && self.text.is_none() {
            return writer.write_event(Event::Empty(start));
        }
        writer.write_event(Event::Start(start))?;
        if let Some(text) = &self.text {
            writer.write_event(Event::Text(BytesText::new(text)))?;
        }
        for child in &self.children {
            child.write(writer)?;
        }
        writer.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }

    /// Reads the root element of a document, with all that is in it but text.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if it is not well-formed.
    pub fn parse(text: &str) -> Result<Element> {
        let corrupt = |error: quick_xml::Error| Error::caused(ErrorKind::Corrupt, "read XML", error);
        let truncated = || Error::new(ErrorKind::Corrupt, "read XML: it ends too early");
        let mut reader = Reader::from_str(text);
        let mut open: Vec<Element> = Vec::new();
        loop {
            let closed = match reader.read_event().map_err(corrupt)? {
                Event::Start(start) => {
                    open.push(Element::from_start(&start)?);
                    continue;
                }
                Event::Empty(start) => Element::from_start(&start)?,
                Event::End(_) => open.pop().ok_or_else(truncated)?,
                Event::Eof => return Err(truncated()),
                _ => continue,
            };
            match open.last_mut() {
                Some(parent) => parent.children.push(closed),
                None => return Ok(closed),
            }
        }
    }

    fn from_start(start: &BytesStart<'_>) -> Result<Element> {
        let mut element = Element::new(start.name().into_inner());
        for attribute in start.attributes() {
            let attribute =
                attribute.map_err(|error| Error::caused(ErrorKind::Corrupt, "read XML", error))?;
            let value = attribute
                .normalized_value(XmlVersion::default())
                .map_err(|error| Error::caused(ErrorKind::Corrupt, "read XML", error))?;
            element = element.with(attribute.key.into_inner(), value);
        }
        Ok(element)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let element = Element::new("disk")
            .with("type", "file")
            .child(Element::new("source").with("file", "/mnt/a & b/<'\">/disk"))
            .child(Element::new("target").with("dev", "vda"));
        let xml = element.to_xml().unwrap();
        assert!(xml.contains("&amp; b/&lt;"), "{xml}");
        assert_eq!(Element::parse(&xml).unwrap(), element);
    }

    #[test]
    fn text_is_escaped_and_indented() {
        let element = Element::new("os").text_child("cmdline", "a<b & \"c\"").child(Element::new("acpi"));
        assert_eq!(
            element.to_xml().unwrap(),
            "<os>\n  <cmdline>a&lt;b &amp; &quot;c&quot;</cmdline>\n  <acpi/>\n</os>\n"
        );
    }

    #[test]
    fn what_xml_cannot_carry_is_refused() {
        for bad in ["a\u{0}b", "a\nb", "\u{1b}[31m", "\u{ffff}"] {
            assert!(Element::new("x").with("y", bad).to_xml().is_err(), "{bad:?}");
            assert!(Element::new("x").text_child("y", bad).to_xml().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn broken_xml_is_an_error() {
        for bad in ["", "<a>", "<a></b>", "</a>", "<a b=></a>", "<a b='&nope;'/>", "text"] {
            assert!(Element::parse(bad).is_err(), "{bad:?}");
        }
    }
}
