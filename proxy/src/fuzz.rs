//! Bytes for parsers of what others send: some that are known to be interesting, changed at random. The targets are the modules `fuzz` beside the
//! parsers; each test of theirs is one, runs a few hundred cases with all other tests, and as many as there is time for with `cargo xtask fuzz`.
//! A case that fails is made small, printed, and kept in `proptest-regressions`, from where it is tried first from then on.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Longest input: more than a record holds, so that what spans records is among them.
const BYTES_MAX: usize = 20_000;

/// Changes of one input.
const CHANGES_MAX: usize = 6;

#[derive(Clone, Debug)]
enum Change {
    /// A byte is another one.
    Byte(Index, u8),
    /// One bit is.
    Bit(Index, u8),
    /// What is from here on is not there.
    Cut(Index),
    /// What is from one place to another is there again, or not at all.
    Again(Index, Index, bool),
    /// Something new comes in between.
    More(Index, Vec<u8>),
    /// Another known input does.
    Other(Index, Vec<u8>),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let at = |index: &Index, bytes: &[u8]| index.index(bytes.len() + 1);
        match self {
            Self::Byte(place, byte) if !bytes.is_empty() => {
                let place = place.index(bytes.len());
                bytes[place] = *byte;
            }
            Self::Bit(place, bit) if !bytes.is_empty() => {
                let place = place.index(bytes.len());
                bytes[place] ^= 1 << bit;
            }
            Self::Byte(..) | Self::Bit(..) => {}
            Self::Cut(place) => bytes.truncate(at(place, bytes)),
            Self::Again(one, other, twice) => {
                let (one, other) = (at(one, bytes), at(other, bytes));
                let range = one.min(other)..one.max(other);
                let part = if *twice { bytes[range.clone()].repeat(2) } else { Vec::new() };
                bytes.splice(range, part);
            }
            Self::More(place, more) | Self::Other(place, more) => {
                let place = at(place, bytes);
                bytes.splice(place..place, more.iter().copied());
            }
        }
        bytes.truncate(BYTES_MAX);
    }
}

/// One of the known inputs, changed; now and then as it is, or nothing of it.
pub(crate) fn changed(known: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let other = select(known.clone());
    let change = prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(place, byte)| Change::Byte(place, byte)),
        (any::<Index>(), 0..8u8).prop_map(|(place, bit)| Change::Bit(place, bit)),
        any::<Index>().prop_map(Change::Cut),
        any::<(Index, Index, bool)>().prop_map(|(one, other, twice)| Change::Again(one, other, twice)),
        (any::<Index>(), vec(any::<u8>(), 0..40)).prop_map(|(place, more)| Change::More(place, more)),
        (any::<Index>(), other).prop_map(|(place, other)| Change::Other(place, other)),
    ];
    let changed = (select(known), vec(change, 0..=CHANGES_MAX)).prop_map(|(mut bytes, changes)| {
        changes.iter().for_each(|change| change.apply(&mut bytes));
        bytes
    });
    prop_oneof![15 => changed, 1 => vec(any::<u8>(), 0..600)]
}

/// Inputs written as hexadecimal digits, one on each line that is neither empty nor a comment.
pub(crate) fn known(text: &str) -> Vec<Vec<u8>> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(unhex).collect()
}

/// The vectors of a page, as [`known`] inputs.
pub(crate) fn shown(page: &str) -> Vec<Vec<u8>> {
    let blocks = page.split("```hex\n").skip(1);
    blocks.map(|block| unhex(block.split("```").next().unwrap())).collect()
}

fn unhex(digits: &str) -> Vec<u8> {
    let digits: Vec<char> = digits.chars().filter(|digit| !digit.is_whitespace()).collect();
    let pairs = digits.chunks(2).map(|pair| pair.iter().collect::<String>());
    pairs.map(|pair| u8::from_str_radix(&pair, 16).unwrap()).collect()
}
