//! A private, sparse copy of an allocation map: what recovery builds and what inspectors read.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::format::{BLOCKS_PER_PAGE, BlockState, Change, PAGE_WORDS, STATES_PER_WORD, StateWord, page_of};
use crate::units::BlockSpan;

/// The words of one map page.
pub type PageWords = [u64; PAGE_WORDS];

/// A run of blocks in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The blocks, at least one.
    pub span: BlockSpan,
    /// The state of each of them.
    pub state: BlockState,
}

/// The states of all blocks of a layer; pages that were never written to take no memory, and are all `Base`. A page that a
/// change covers whole takes its place in the tree only, however many there are: two changes may cover a disk of 16 TiB.
#[derive(Debug, Default)]
pub struct SparseStates {
    pages: BTreeMap<u64, Arc<PageWords>>,
    /// Pages all in one state, by its number, which all pages share that are so.
    filled: [Option<Arc<PageWords>>; 3],
}

impl SparseStates {
    /// Puts a whole page in its place.
    pub fn insert_page(&mut self, page: u64, words: Box<PageWords>) {
        self.pages.insert(page, Arc::from(words));
    }

    fn filled(&mut self, state: BlockState) -> Arc<PageWords> {
        let shared = &mut self.filled[state as usize];
        shared.get_or_insert_with(|| Arc::new([StateWord::filled(state).0; PAGE_WORDS])).clone()
    }

    /// The pages that are there, in order.
    pub fn pages(&self) -> impl Iterator<Item = (u64, &PageWords)> {
        self.pages.iter().map(|(&page, words)| (page, words.as_ref()))
    }

    /// The words of `page`, if it is there.
    pub fn page(&self, page: u64) -> Option<&PageWords> {
        self.pages.get(&page).map(Arc::as_ref)
    }

    /// Gives the blocks of `change` their new state.
    pub fn apply(&mut self, change: Change) {
        let BlockSpan { start, end } = change.span;
        let (first, last) = (start.next_multiple_of(BLOCKS_PER_PAGE).min(end), end - end % BLOCKS_PER_PAGE);
        self.apply_to_parts(BlockSpan::new(start, first), change.state);
        if first < last {
            let words = self.filled(change.state);
            for page in first / BLOCKS_PER_PAGE..last / BLOCKS_PER_PAGE {
                self.pages.insert(page, words.clone());
            }
        }
        self.apply_to_parts(BlockSpan::new(last.max(first), end), change.state);
    }

    /// Gives blocks a state, each page that they touch having words of its own afterwards.
    fn apply_to_parts(&mut self, span: BlockSpan, state: BlockState) {
        let mut pieces = word_pieces(span).peekable();
        while let Some(page) = pieces.peek().map(|piece| piece.page) {
            let words = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE_WORDS]));
            let words = Arc::make_mut(words);
            while let Some(piece) = pieces.next_if(|piece| piece.page == page) {
                words[piece.word] = StateWord(words[piece.word]).with(piece.start, piece.end, state).0;
            }
        }
    }

    /// Applies changes in their order, so that of those that overlap the last one holds. Each block is touched once,
    /// however many changes cover it: a journal of a hostile store may cover all of a large disk in each of them.
    pub fn apply_all(&mut self, changes: &[Change]) {
        // From the last one on, what is covered already; runs that neither overlap nor touch, by their start.
        let mut covered: BTreeMap<u64, u64> = BTreeMap::new();
        for change in changes.iter().rev() {
            let BlockSpan { start, end } = change.span;
            let before = covered.range(..start).next_back().filter(|&(_, &run_end)| run_end >= start);
            let from = before.map_or(start, |(&run_start, _)| run_start);
            let runs: Vec<(u64, u64)> = covered.range(from..=end).map(|(&s, &e)| (s, e)).collect();
            let (mut at, mut run) = (start, (start, end));
            for (run_start, run_end) in runs {
                if at < run_start {
                    self.apply(Change { span: BlockSpan::new(at, run_start), state: change.state });
                }
                at = at.max(run_end);
                run = (run.0.min(run_start), run.1.max(run_end));
                covered.remove(&run_start);
            }
            if at < end {
                self.apply(Change { span: BlockSpan::new(at, end), state: change.state });
            }
            covered.insert(run.0, run.1);
        }
    }

    /// The longest run from block `start` on, up to `end` exclusive.
    pub fn extent(&self, start: u64, end: u64) -> Extent {
        extent_from(start, end, |page| self.page(page).map(|words| |word: usize| words[word]))
    }

    /// The last block in state `Data`, if there is one.
    pub fn last_data_block(&self) -> Option<u64> {
        last_block(self.pages.iter(), |state| state == BlockState::Data)
    }

    /// A block behind the end of a disk of `blocks` blocks that has a state of its own, if there is one. There must not:
    /// what is not there cannot be written to the journal.
    pub fn block_behind(&self, blocks: u64) -> Option<u64> {
        let last =
            last_block(self.pages.range(blocks / BLOCKS_PER_PAGE..), |state| state != BlockState::Base);
        last.filter(|&last| last >= blocks)
    }

    /// The blocks whose state differs between the two maps, as runs in order.
    pub fn differing_spans(&self, other: &Self) -> Vec<BlockSpan> {
        const NONE: PageWords = [0; PAGE_WORDS];
        let mut spans: Vec<BlockSpan> = Vec::new();
        let mut pages: Vec<u64> = self.pages.keys().chain(other.pages.keys()).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        for page in pages {
            let (ours, theirs) = (self.page(page).unwrap_or(&NONE), other.page(page).unwrap_or(&NONE));
            let blocks = (0..PAGE_WORDS)
                .filter(|&word| ours[word] != theirs[word])
                .flat_map(|word| (0..STATES_PER_WORD).map(move |at| (word, at)))
                .filter(|&(word, at)| StateWord(ours[word]).get(at) != StateWord(theirs[word]).get(at));
            for (word, at) in blocks {
                let block = page * BLOCKS_PER_PAGE + (word * STATES_PER_WORD + at) as u64;
                match spans.last_mut() {
                    Some(last) if last.end == block => last.end = block + 1,
                    _ => spans.push(BlockSpan::new(block, block + 1)),
                }
            }
        }
        spans
    }
}

/// The last block of some pages, which are in order, whose state is wanted.
fn last_block<'a>(
    pages: impl DoubleEndedIterator<Item = (&'a u64, &'a Arc<PageWords>)>,
    is_wanted: impl Fn(BlockState) -> bool,
) -> Option<u64> {
    pages.rev().find_map(|(page, words)| {
        let block = (0..PAGE_WORDS * STATES_PER_WORD)
            .rev()
            .find(|at| is_wanted(StateWord(words[at / STATES_PER_WORD]).get(at % STATES_PER_WORD)))?;
        Some(page * BLOCKS_PER_PAGE + block as u64)
    })
}

/// The part of a span that lies in one word.
pub struct WordPiece {
    /// The page.
    pub page: u64,
    /// The word within the page.
    pub word: usize,
    /// First state within the word.
    pub start: usize,
    /// One past the last state within the word, at most 32.
    pub end: usize,
}

/// Cuts `span` at the borders of words.
pub fn word_pieces(span: BlockSpan) -> impl Iterator<Item = WordPiece> {
    let mut block = span.start;
    std::iter::from_fn(move || {
        if block >= span.end {
            return None;
        }
        let (page, within) = page_of(block);
        let (word, start) = (within / STATES_PER_WORD, within % STATES_PER_WORD);
        let left = usize::try_from(span.end - block).unwrap_or(usize::MAX);
        let end = STATES_PER_WORD.min(start.saturating_add(left));
        block += (end - start) as u64;
        Some(WordPiece { page, word, start, end })
    })
}

/// The longest run from block `start` on, up to `end` exclusive, in a map whose page `p` is `page(p)`: a function from
/// word index to word, or `None` for a page that is all `Base`.
///
/// # Panics
/// If there is no block between `start` and `end`.
pub fn extent_from<F: Fn(usize) -> u64>(start: u64, end: u64, page: impl Fn(u64) -> Option<F>) -> Extent {
    assert!(start < end, "no block in {start}..{end}");
    let mut found: Option<BlockState> = None;
    let mut block = start;
    while block < end {
        let (index, within) = page_of(block);
        let in_page = match page(index) {
            None if found.is_none_or(|state| state == BlockState::Base) => {
                found = Some(BlockState::Base);
                BLOCKS_PER_PAGE - within as u64
            }
            None => break,
            Some(word_at) => {
                let (word, at) = (within / STATES_PER_WORD, within % STATES_PER_WORD);
                let word = StateWord(word_at(word));
                let state = *found.get_or_insert_with(|| word.get(at));
                let run = word.run_length(at, state);
                if run < STATES_PER_WORD - at {
                    block += run as u64;
                    break;
                }
                run as u64
            }
        };
        block += in_page;
    }
    Extent { span: BlockSpan::new(start, block.min(end)), state: found.expect("at least one block") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(start: u64, end: u64, state: BlockState) -> Change {
        Change { span: BlockSpan::new(start, end), state }
    }

    #[test]
    fn extents_run_across_words_and_pages() {
        let mut states = SparseStates::default();
        states.apply(change(16_000, 40_000, BlockState::Data));
        states.apply(change(16_200, 16_201, BlockState::Zero));
        let extent = |start| states.extent(start, 1 << 20);
        assert_eq!(extent(0), Extent { span: BlockSpan::new(0, 16_000), state: BlockState::Base });
        assert_eq!(extent(16_000).span, BlockSpan::new(16_000, 16_200));
        assert_eq!(extent(16_200), Extent { span: BlockSpan::new(16_200, 16_201), state: BlockState::Zero });
        assert_eq!(extent(16_201).span, BlockSpan::new(16_201, 40_000));
        assert_eq!(extent(40_000).span, BlockSpan::new(40_000, 1 << 20));
        assert_eq!(states.extent(16_300, 16_310).span, BlockSpan::new(16_300, 16_310));
        assert_eq!(states.last_data_block(), Some(39_999));
        assert_eq!((states.block_behind(40_000), states.block_behind(39_999)), (None, Some(39_999)));
    }

    #[test]
    fn changes_applied_at_once_are_what_they_are_one_after_the_other() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let changes: Vec<Change> = (0..random(20))
                .map(|_| {
                    let (start, kind) = (random(40_000), usize::try_from(random(3)).unwrap());
                    let len = 1 + random([3, 100, 20_000][kind]);
                    change(start, start + len, BlockState::from_bits(random(3)).unwrap())
                })
                .collect();
            let (mut one_by_one, mut at_once) = (SparseStates::default(), SparseStates::default());
            changes.iter().for_each(|&change| one_by_one.apply(change));
            at_once.apply_all(&changes);
            assert_eq!(one_by_one.pages, at_once.pages, "{changes:?}");
        }
    }

    /// Opening a disk whose journal says 16,000 times that all of it is zero took hours.
    #[test]
    fn a_block_is_touched_once_however_many_changes_cover_it() {
        let mut states = SparseStates::default();
        let changes = vec![change(0, 1 << 24, BlockState::Zero); 16_128];
        states.apply_all(&changes);
        assert_eq!(states.extent(0, 1 << 24).span.end, 1 << 24);
    }

    /// Two changes over a disk of 16 TiB took 1 GiB.
    #[test]
    fn pages_that_changes_cover_whole_share_their_words() {
        let mut states = SparseStates::default();
        let (half, end) = (1 << 23, 1 << 24);
        states.apply_all(&[change(5, end, BlockState::Zero), change(half, end, BlockState::Data)]);
        let own = states.pages.values().filter(|words| Arc::strong_count(words) == 1).count();
        assert!(own <= 3, "{own} pages have words of their own");
        assert_eq!(states.extent(5, end).span, BlockSpan::new(5, half));
        assert_eq!(states.extent(half, end).span, BlockSpan::new(half, end));
        states.apply(change(20_000, 20_001, BlockState::Base));
        assert_eq!(states.extent(5, end).span.end, 20_000);
        assert_eq!(states.extent(40_000, end).span.end, half, "no other page has changed");
    }

    #[test]
    fn maps_are_compared_block_by_block() {
        let (mut one, mut two) = (SparseStates::default(), SparseStates::default());
        one.apply(change(10, 20, BlockState::Data));
        two.apply(change(10, 20, BlockState::Data));
        two.apply(change(15, 17, BlockState::Zero));
        two.apply(change(99_999, 100_001, BlockState::Data));
        two.apply(change(50_000, 50_001, BlockState::Base));
        let expected = vec![BlockSpan::new(15, 17), BlockSpan::new(99_999, 100_001)];
        assert_eq!(one.differing_spans(&two), expected);
        assert_eq!(two.differing_spans(&one), expected);
    }
}
