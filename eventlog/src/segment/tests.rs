use proptest::prelude::*;

use super::*;

type Given = (u8, u8, bool, u8, u8, u8, String);

fn any_events() -> impl Strategy<Value = Vec<Given>> {
    let event = (0..4_u8, 0..3_u8, any::<bool>(), 0..3_u8, 0..4_u8, 0..2_u8, "[a-zü\"{}]{0,12}");
    prop::collection::vec(event, 1..60)
}

/// A page of well-ordered events.
fn page_of(given: &[Given]) -> Page {
    let (mut text, mut versions, mut entries) = (String::new(), BTreeMap::new(), Vec::new());
    let mut put = |part: &str| {
        let start = u32::try_from(text.len()).unwrap();
        text.push_str(part);
        start..u32::try_from(text.len()).unwrap()
    };
    let (mut epoch, mut time, mut command) = (1, 1_790_000_000_000_000, 0);
    for (i, (scope, kind, next_command, reason, cause, next_epoch, payload)) in given.iter().enumerate() {
        let position = 1_000 + i as u64;
        epoch += u64::from(*next_epoch);
        time += i64::from(*cause) * 7;
        command += u128::from(*next_command);
        let version = versions.entry(*scope).or_insert(5_u64);
        *version += 1;
        entries.push(Entry {
            position: Position(position),
            epoch: Epoch(epoch),
            version: Version(*version),
            schema: 1 + u16::from(*kind / 2),
            cause: (*cause > 0).then(|| Position(position - u64::from(*cause))),
            command_id: Uuid::from_u128(command << 64 | 1),
            recorded_at: UnixMicros(time),
            scope: put(&format!("scope/{scope}")),
            event_type: put(if *kind == 0 { "Began" } else { "Went" }),
            actor: put(&format!("actor {}", kind % 2)),
            reason: (*reason > 0).then(|| put(&format!("because {reason}"))),
            payload: put(payload),
        });
    }
    Page::new(text, entries)
}

fn sealed(page: &Page) -> Segment {
    Segment::seal(page.events(), EventHash([1; 32]), EventHash([2; 32])).unwrap()
}

proptest! {
    #[test]
    fn what_was_sealed_is_read_again(given in any_events()) {
        let page = page_of(&given);
        let segment = sealed(&page);
        let opened = segment.open().unwrap();
        prop_assert!(page.events().eq(opened.events()));
        prop_assert_eq!((segment.first, segment.last), (Position(1_000), page.last()));
    }

    /// Whoever can write a row can also make its hashes right; what is inside must still not be believed.
    #[test]
    fn hostile_bodies_are_refused_or_are_whole_events(given in any_events(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut segment = sealed(&page_of(&given));
        let mut raw = zstd::bulk::decompress(&segment.body, segment.raw_bytes).unwrap();
        let at = at.index(raw.len());
        raw[at] = byte;
        segment.body = zstd::bulk::compress(&raw, 1).unwrap().into();
        segment.body_hash = hash_of(&segment.body);
        if let Ok(page) = segment.open() {
            prop_assert_eq!(page.last(), segment.last);
            prop_assert!(page.events().all(|event| event.position >= segment.first));
        }
    }
}

#[test]
fn a_changed_body_is_told_by_its_hash() {
    let mut segment = sealed(&page_of(&[(0, 0, true, 0, 0, 0, "{}".into())]));
    let mut body = segment.body.to_vec();
    body[3] ^= 1;
    segment.body = body.into();
    assert!(matches!(segment.open(), Err(SegmentError::Body { .. })));
}

#[test]
fn a_body_that_unpacks_to_more_than_it_says_is_refused() {
    let mut segment = sealed(&page_of(&[(0, 0, true, 0, 0, 0, "{}".into())]));
    segment.raw_bytes -= 1;
    assert_eq!(segment.open().unwrap_err(), SegmentError::Compression);
    segment.raw_bytes = RAW_BYTES_MAX + 1;
    assert_eq!(segment.open().unwrap_err(), SegmentError::Compression);
}
