//! How some bytes became others, where one run of them changed: the smallest way to tell of one changed field.

/// At `at`, `cut` bytes were replaced by `put`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Splice {
    /// Where.
    pub at: usize,
    /// How many went.
    pub cut: usize,
    /// What came.
    pub put: Vec<u8>,
}

impl Splice {
    /// What turns `old` into `new`: all between what they begin with in common and what they end with in common.
    #[must_use]
    pub fn between(old: &[u8], new: &[u8]) -> Self {
        let at = common(old.chunks(STEP).zip(new.chunks(STEP)), old.iter().zip(new));
        let (old_rest, new_rest) = (&old[at..], &new[at..]);
        let end = common(
            old_rest.rchunks(STEP).zip(new_rest.rchunks(STEP)),
            old_rest.iter().rev().zip(new_rest.iter().rev()),
        );
        Self { at, cut: old_rest.len() - end, put: new_rest[..new_rest.len() - end].to_vec() }
    }

    /// What `old` becomes. None if it is too short to be what this was made from.
    #[must_use]
    pub fn apply(&self, old: &[u8]) -> Option<Vec<u8>> {
        let (before, rest) = old.split_at_checked(self.at)?;
        let (_, after) = rest.split_at_checked(self.cut)?;
        Some([before, &self.put, after].concat())
    }
}

/// Compared at once, which takes a processor about as long as a single byte.
const STEP: usize = 64;

/// How many bytes are the same from the beginning on: by steps, and by bytes where the steps differ.
fn common<'a>(
    steps: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    bytes: impl Iterator<Item = (&'a u8, &'a u8)>,
) -> usize {
    let same = steps.take_while(|(old, new)| old == new).map(|(old, _)| old.len()).sum();
    same + bytes.skip(same).take_while(|(old, new)| old == new).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_spliced_is_what_was_to_be(
            old in prop::collection::vec(0..4_u8, 0..400),
            new in prop::collection::vec(0..4_u8, 0..400),
        ) {
            prop_assert_eq!(Splice::between(&old, &new).apply(&old), Some(new));
        }

        /// One run that changed costs no more than it has.
        #[test]
        fn a_splice_is_as_long_as_what_changed(
            old in prop::collection::vec(any::<u8>(), 1..400),
            at in any::<prop::sample::Index>(),
            cut in 0..9_usize,
            put in prop::collection::vec(any::<u8>(), 0..9),
        ) {
            let at = at.index(old.len());
            let made = Splice { at, cut: cut.min(old.len() - at), put };
            let new = made.apply(&old).unwrap();
            let found = Splice::between(&old, &new);
            prop_assert!(found.put.len() <= made.put.len() && found.cut <= made.cut);
            prop_assert_eq!(found.apply(&old), Some(new));
        }

        #[test]
        fn one_that_does_not_fit_is_refused(at in 0..20_usize, cut in 0..20_usize, length in 0..20_usize) {
            let applied = Splice { at, cut, put: vec![1] }.apply(&vec![0; length]);
            prop_assert_eq!(applied.map(|bytes| bytes.len()), (at + cut <= length).then(|| length - cut + 1));
        }
    }
}
