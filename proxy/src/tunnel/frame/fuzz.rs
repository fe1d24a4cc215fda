//! Fuzz target: messages, as they come from a peer.

use super::*;
use crate::fuzz::{changed, known, shown};
use proptest::prelude::*;

/// The vectors of the format's page, and the corpus beside this file.
pub(crate) fn corpus() -> Vec<Vec<u8>> {
    let mut all = shown(include_str!("../../../../docs/tunnel.md"));
    assert!(all.len() >= 2, "the page has vectors");
    all.extend(known(include_str!("corpus.txt")));
    all
}

/// Says a message again, which must be what it was: at once if its words were short, and from then on in any case.
fn again(frame: &Frame) -> Result<Frame, TestCaseError> {
    let bytes = frame.encode();
    prop_assert!(bytes.len() <= HEADER + MESSAGE_BYTES_MAX, "{} bytes", bytes.len());
    let (head, message) = bytes.split_first_chunk().unwrap();
    let head = Head::decode(*head).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(head.length, message.len());
    let Kind::Message(kind) = head.kind else { return Err(TestCaseError::fail("no message")) };
    Frame::decode(kind, message).map_err(|error| TestCaseError::fail(error.to_string()))
}

proptest! {
    #[test]
    fn messages(bytes in changed(corpus())) {
        let mut rest = &bytes[..];
        while let Some((head, after)) = rest.split_first_chunk() {
            let Ok(decoded) = Head::decode(*head) else { break };
            prop_assert_eq!(decoded.encode(), *head);
            if let Kind::Message(_) = decoded.kind {
                // Whoever reads it waits for so many bytes and no more.
                prop_assert!(decoded.length <= MESSAGE_BYTES_MAX);
            }
            let Some((message, after)) = after.split_at_checked(decoded.length) else { break };
            rest = after;
            // Whatever the head says that it is.
            for kind in [MessageKind::Open, MessageKind::Opened, MessageKind::Refused] {
                let Ok(frame) = Frame::decode(kind, message) else { continue };
                let said = again(&frame)?;
                let long = matches!(&frame, Frame::Refused(refused)
                    if refused.detail.len().max(refused.rule.as_ref().map_or(0, String::len)) > TEXT_BYTES_MAX);
                prop_assert!(long || said == frame, "{frame:?} became {said:?}");
                prop_assert_eq!(&again(&said)?, &said);
            }
        }
    }
}
