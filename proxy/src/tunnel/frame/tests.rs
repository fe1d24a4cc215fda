use super::*;
use proptest::prelude::*;
use std::fmt::Write;

/// The OPEN frame that `docs/tunnel.md` shows.
fn documented() -> Frame {
    Frame::Open(Open {
        service: "default/db".parse().unwrap(),
        port: Port::new(5432).unwrap(),
        source: "127.0.0.1:40000".parse().unwrap(),
        connection_id: Uuid::from_u128(0x0192_f0c1_2b3c_7d4e_8f50_6172_8394_a5b6),
        version: ConfigVersion::new(Epoch(1), Position(42)),
    })
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let reason = prop::sample::select(CloseReason::ALL);
    let version = (any::<u64>(), any::<u64>()).prop_map(|(e, p)| ConfigVersion::new(Epoch(e), Position(p)));
    let open = (
        "[a-z]{1,9}/[a-z]{1,9}",
        1..=u16::MAX,
        any::<[u8; 4]>(),
        any::<u16>(),
        any::<u128>(),
        version.clone(),
    )
        .prop_map(|(service, port, ip, source_port, id, version)| {
            Frame::Open(Open {
                service: service.parse().unwrap(),
                port: Port::new(port).unwrap(),
                source: SocketAddr::from((ip, source_port)),
                connection_id: Uuid::from_u128(id),
                version,
            })
        });
    let refused = (reason, prop::option::of("[a-z/#]{1,40}"), "\\PC{0,200}", prop::option::of(version))
        .prop_map(|(reason, rule, detail, version)| {
            Frame::Refused(Refused { reason, rule, detail, version })
        });
    prop_oneof![open, Just(Frame::Opened), refused]
}

/// Reads a whole frame, and nothing else.
fn parse(bytes: &[u8]) -> Result<Frame, FrameError> {
    let (head, message) = bytes.split_first_chunk().unwrap();
    let head = Head::decode(*head)?;
    let Kind::Message(kind) = head.kind else { return Err(FrameError::Data) };
    assert_eq!(head.length, message.len());
    Frame::decode(kind, message)
}

/// The vector in `docs/tunnel.md` with this number.
fn shown(number: usize) -> String {
    let document = include_str!("../../../../docs/tunnel.md");
    let vector = document.split("```hex\n").nth(number + 1).unwrap();
    vector.split("```").next().unwrap().split_whitespace().collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[test]
fn the_documented_vectors_are_what_is_sent() {
    let bytes = documented().encode();
    assert_eq!(shown(0), hex(&bytes));
    assert_eq!(parse(&bytes).unwrap(), documented());

    let stream =
        [&Frame::Opened.encode()[..], &Head::data(5).encode(), b"hello", &Head::END.encode()].concat();
    assert_eq!(shown(1), hex(&stream));
}

#[test]
fn a_frame_that_may_not_be_is_refused_by_its_head() {
    for (head, accepted) in [
        ([0, 0xff, 0xff, 0xff], true),
        ([1, 0, 0, 0], true),
        ([1, 0, 0, 1], false),
        ([16, 0, 0x10, 0], true),
        ([16, 0, 0x10, 1], false),
        ([17, 0, 0x10, 1], false),
        ([18, 1, 0, 0], false),
        ([2, 0, 0, 0], false),
        ([0xff, 0, 0, 0], false),
    ] {
        let decoded = Head::decode(head);
        assert_eq!(decoded.is_ok(), accepted, "{head:?}");
        if let Ok(decoded) = decoded {
            assert_eq!(decoded.encode(), head);
        }
    }
}

#[test]
fn a_refusal_of_any_length_fits() {
    let long = "é".repeat(9_000);
    let refused =
        Refused { reason: CloseReason::Internal, rule: Some(long.clone()), detail: long, version: None };
    assert!(Frame::Refused(refused).encode().len() <= MESSAGE_BYTES_MAX);
}

proptest! {
    #[test]
    fn frames_round_trip(frame in any_frame()) {
        prop_assert_eq!(parse(&frame.encode()).unwrap(), frame);
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error(head: [u8; HEADER], bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Head::decode(head);
        for kind in [MessageKind::Open, MessageKind::Opened, MessageKind::Refused] {
            let _ = Frame::decode(kind, &bytes);
        }
    }

    /// A changed frame is refused, or is another valid frame; it never is half of one.
    #[test]
    fn changed_frames_decode_to_whole_frames(frame in any_frame(), at: prop::sample::Index, flip in 1u8..) {
        let mut bytes = frame.encode();
        if bytes.len() == HEADER { return Ok(()); }
        let at = HEADER + at.index(bytes.len() - HEADER);
        bytes[at] ^= flip;
        if let Ok(other) = parse(&bytes) {
            prop_assert_eq!(parse(&other.encode()).unwrap(), other);
        }
    }
}
