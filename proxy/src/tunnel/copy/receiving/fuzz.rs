//! Fuzz target: the frames of a stream, cut into records anywhere.

use super::*;
use crate::fuzz::changed;
use crate::tunnel::frame::fuzz::corpus;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// What a stream is.
#[derive(Debug, Default, PartialEq)]
struct Found {
    /// Bytes of the application.
    data: Vec<u8>,
    /// Where the stream ended.
    end: Option<usize>,
    /// Why it is none.
    wrong: Option<String>,
}

/// The same from all bytes at once, as `docs/tunnel.md` has it.
fn expected(bytes: &[u8]) -> Found {
    let mut found = Found::default();
    let mut rest = bytes;
    while let Some((head, after)) = rest.split_first_chunk() {
        match Head::decode(*head) {
            Ok(Head { kind: Kind::Data, length }) => {
                let here = length.min(after.len());
                found.data.extend_from_slice(&after[..here]);
                rest = &after[here..];
            }
            Ok(Head { kind: Kind::End, .. }) => {
                found.end = Some(bytes.len() - after.len());
                break;
            }
            Ok(Head { kind: Kind::Message(_), .. }) => {
                found.wrong = Some(FrameError::Message.to_string());
                break;
            }
            Err(error) => {
                found.wrong = Some(error.to_string());
                break;
            }
        }
    }
    found
}

/// From pieces that end at these places.
fn in_pieces(bytes: &[u8], ends: &[usize]) -> Found {
    let mut receiving = Receiving::default();
    let mut found = Found::default();
    let mut from = 0;
    for end in ends.iter().copied().chain([bytes.len()]) {
        // As it lies in the buffer of the thread, with other things around it.
        let buffer = [&[0xee; 7][..], &bytes[from..end], &[0xee; 9]].concat();
        let content = 7..7 + end - from;
        let mut pieces = Vec::new();
        match receiving.unframe(&buffer, content.clone(), &mut pieces) {
            Ok(at) => {
                assert!((content.start..=content.end).contains(&at));
                for piece in pieces {
                    assert!(content.start <= piece.start && piece.start < piece.end && piece.end <= at);
                    found.data.extend_from_slice(&buffer[piece]);
                }
                if receiving.stage == Stage::Ending {
                    found.end = Some(from + at - content.start);
                    return found;
                }
                assert_eq!(at, content.end, "all is taken unless the stream ends");
            }
            Err(error) => {
                for piece in pieces {
                    found.data.extend_from_slice(&buffer[piece]);
                }
                found.wrong = Some(error.to_string());
                return found;
            }
        }
        from = end;
    }
    found
}

proptest! {
    #[test]
    fn streams(bytes in changed(corpus()), cuts in vec(any::<Index>(), 0..12)) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        ends.sort_unstable();
        let expected = expected(&bytes);
        prop_assert_eq!(in_pieces(&bytes, &ends), expected);
        if bytes.len() < 400 {
            let each: Vec<usize> = (0..bytes.len()).collect();
            prop_assert_eq!(in_pieces(&bytes, &each), in_pieces(&bytes, &[]));
        }
    }
}
