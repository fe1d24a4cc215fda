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

#[test]
fn the_documented_vector_is_what_is_sent() {
    let bytes = documented().encode();
    let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let document = include_str!("../../../../docs/tunnel.md");
    let shown: String =
        document.split("```hex\n").nth(1).unwrap().split("```").next().unwrap().split_whitespace().collect();
    assert_eq!(shown, hex);
    assert_eq!(Frame::decode(&bytes[LENGTH_BYTES..]).unwrap(), documented());
}

#[tokio::test]
async fn nothing_behind_a_frame_is_read() {
    let mut bytes = documented().encode();
    bytes.extend_from_slice(b"application");
    let mut stream = bytes.as_slice();
    assert_eq!(read(&mut stream).await.unwrap(), documented());
    assert_eq!(stream, b"application");
}

#[tokio::test]
async fn a_long_frame_is_refused_before_it_is_read() {
    let mut stream: &[u8] = &[0xff; 8];
    assert!(matches!(read(&mut stream).await, Err(FrameError::TooLong(u32::MAX))));
    assert_eq!(stream.len(), 4);
}

#[test]
fn a_refusal_of_any_length_fits() {
    let long = "é".repeat(9_000);
    let refused =
        Refused { reason: CloseReason::Internal, rule: Some(long.clone()), detail: long, version: None };
    assert!(Frame::Refused(refused).encode().len() <= FRAME_BYTES_MAX);
}

proptest! {
    #[test]
    fn frames_round_trip(frame in any_frame()) {
        let bytes = frame.encode();
        prop_assert_eq!(Frame::decode(&bytes[LENGTH_BYTES..]).unwrap(), frame);
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Frame::decode(&bytes);
    }

    /// A changed frame is refused, or is another valid frame; it never is half of one.
    #[test]
    fn changed_frames_decode_to_whole_frames(frame in any_frame(), at: prop::sample::Index, flip in 1u8..) {
        let mut bytes = frame.encode();
        bytes.drain(..LENGTH_BYTES);
        if bytes.is_empty() { return Ok(()); }
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(other) = Frame::decode(&bytes) {
            prop_assert_eq!(Frame::decode(&other.encode()[LENGTH_BYTES..]).unwrap(), other);
        }
    }
}
