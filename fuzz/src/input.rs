//! The fuzzer's bytes, taken piece by piece. Past their end everything is zero.

/// What is left of the bytes.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Up to `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(len.min(self.0.len()));
        self.0 = left;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    /// A number of `width` bytes, at most 8, the least significant first.
    fn number(&mut self, width: usize) -> u64 {
        self.bytes(width).iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.number(1).to_le_bytes()[0]
    }

    /// A number of 8 bytes.
    pub fn long(&mut self) -> u64 {
        self.number(8)
    }

    /// A number below `end`, of as few bytes as it may need; 0 if `end` is.
    pub fn below(&mut self, end: u64) -> u64 {
        let width = (64 - end.leading_zeros()).div_ceil(8) as usize;
        self.number(width) % end.max(1)
    }

    /// How many of something: 0 to `most`.
    pub fn count(&mut self, most: u64) -> u64 {
        self.below(most + 1)
    }
}
