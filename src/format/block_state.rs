//! The state of a block, and 32 of them packed into a 64-bit word.

/// Where the contents of a block come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockState {
    /// The base holds it; beyond the base's end, and over a blank base, it is zeroes.
    Base = 0,
    /// The overlay's data file holds it.
    Data = 1,
    /// It is zeroes, whatever the base or the data file hold there.
    Zero = 2,
}

impl BlockState {
    /// The state that two bits stand for; `None` for the reserved value 3.
    pub fn from_bits(bits: u64) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::Base),
            1 => Some(Self::Data),
            2 => Some(Self::Zero),
            _ => None,
        }
    }
}

/// States in a [`StateWord`].
pub const STATES_PER_WORD: usize = 32;

/// The low bit of every pair.
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// 32 block states, block 0 in the lowest two bits. The pair `11` is reserved: words from disk are checked with
/// [`StateWord::is_valid`] before a state is read from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct StateWord(pub u64);

impl StateWord {
    /// A word with every block in `state`.
    pub fn filled(state: BlockState) -> Self {
        Self(LOW_BITS * (state as u64))
    }

    /// Whether no pair is the reserved `11`.
    pub fn is_valid(self) -> bool {
        self.0 & (self.0 >> 1) & LOW_BITS == 0
    }

    /// The state of block `index` of the word.
    ///
    /// # Panics
    /// If `index` is 32 or more.
    pub fn get(self, index: usize) -> BlockState {
        assert!(index < STATES_PER_WORD);
        BlockState::from_bits(self.0 >> (2 * index)).expect("words are checked when they come from disk")
    }

    /// This word with blocks `start..end` in `state`.
    ///
    /// # Panics
    /// If `start..end` is no range within the word.
    #[must_use]
    pub fn with(self, start: usize, end: usize, state: BlockState) -> Self {
        assert!(start <= end && end <= STATES_PER_WORD);
        let mask = pairs_below(end) & !pairs_below(start);
        Self((self.0 & !mask) | (Self::filled(state).0 & mask))
    }

    /// How many blocks from `start` on, within the word, are in `state` one after the other.
    ///
    /// # Panics
    /// If `start` is 32 or more.
    pub fn run_length(self, start: usize, state: BlockState) -> usize {
        assert!(start < STATES_PER_WORD);
        let other = self.0 ^ Self::filled(state).0;
        let differing = (other | (other >> 1)) & LOW_BITS & !pairs_below(start);
        (differing.trailing_zeros() as usize / 2).min(STATES_PER_WORD) - start
    }
}

/// All bits of the pairs below `index`.
fn pairs_below(index: usize) -> u64 {
    if index == STATES_PER_WORD { u64::MAX } else { (1 << (2 * index)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_the_states_that_were_put_into_it() {
        let word = StateWord::default().with(0, 1, BlockState::Data).with(30, 32, BlockState::Zero);
        assert_eq!(word.get(0), BlockState::Data);
        assert_eq!(word.get(1), BlockState::Base);
        assert_eq!(word.get(31), BlockState::Zero);
        assert_eq!(word.with(0, 32, BlockState::Base), StateWord::default());
        assert_eq!(word.with(5, 5, BlockState::Data), word);
    }

    #[test]
    fn runs_end_where_the_state_changes_or_the_word_does() {
        let word = StateWord::default().with(3, 7, BlockState::Data);
        assert_eq!(word.run_length(0, BlockState::Base), 3);
        assert_eq!(word.run_length(3, BlockState::Data), 4);
        assert_eq!(word.run_length(7, BlockState::Base), 25);
        assert_eq!(word.run_length(3, BlockState::Zero), 0);
        assert_eq!(StateWord::filled(BlockState::Zero).run_length(0, BlockState::Zero), 32);
    }

    #[test]
    fn the_reserved_pair_is_noticed() {
        assert!(StateWord::filled(BlockState::Zero).is_valid());
        assert!(!StateWord(3 << 10).is_valid());
        assert!(StateWord(0b1001).is_valid());
    }
}
