//! Fuzz target: queries, as they come from whoever is on the machine.

use super::*;
use crate::fuzz::{changed, known};
use proptest::prelude::*;
use weft_routing::fixture;

proptest! {
    #[test]
    fn names(bytes in changed(known(include_str!("corpus.txt")))) {
        let snapshot = fixture::snapshot(&"default/web/web-1".parse().unwrap());
        for snapshot in [Some(&snapshot), None] {
            match answer(&bytes, snapshot, &Reach::everything(), |_| false) {
                Asked::Answer(reply, _) => {
                    // Who can make the sidecar answer somebody else gains nothing by it.
                    prop_assert!(reply.len() <= bytes.len() + 200);
                    prop_assert_eq!(&reply[..2], &bytes[..2], "the answer is to this query");
                    prop_assert!(reply[2] & 0x80 != 0, "an answer is no query");
                    prop_assert!(Message::from_vec(&reply).is_ok());
                }
                Asked::Forward(question) => {
                    prop_assert!((HEADER..=bytes.len()).contains(&question.end));
                    prop_assert_eq!(&question.message, &bytes);
                    let failure = question.failure();
                    prop_assert_eq!(&failure[..2], &bytes[..2]);
                }
                Asked::Nothing(_) => {}
            }
        }
    }
}
