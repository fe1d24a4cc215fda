use super::*;
use crate::fixture::Fixture;
use crate::fold::{FoldFrom, fold_to};
use weft_model::Epoch;

impl Fixture {
    async fn write(&self, at: u64) {
        let checkpoint = Checkpoint::of(&self.folded(at).await);
        write(&self.store, checkpoint, self.hash(at).await).await.unwrap();
    }

    /// Why the newest checkpoint is not gone on from.
    async fn refusal(&self) -> Unusable {
        let stored = self.store.fold_checkpoints().await.unwrap().remove(0);
        read(&self.store, &self.reader, &stored).await.unwrap_err()
    }
}

#[tokio::test]
async fn a_fold_from_a_checkpoint_equals_one_from_the_first_event() {
    let fixture = Fixture::new(16).await;
    assert_eq!(load(&fixture.store, &fixture.reader, Position(20)).await, Projection::default());
    fixture.write(7).await;
    fixture.write(12).await;
    for (to, expected) in [(20, 12), (12, 12), (11, 7), (6, 0)] {
        let loaded = load(&fixture.store, &fixture.reader, Position(to)).await;
        assert_eq!(loaded, fixture.folded(expected).await, "up to {to}");
        let from = FoldFrom::Checkpoint(&fixture.store);
        let folded = fold_to(&fixture.reader, Position(to), from, |_| ()).await.unwrap();
        assert_eq!(folded, fixture.folded(to).await);
    }
}

#[tokio::test]
async fn what_is_not_of_this_fold_and_this_log_is_ignored_with_a_reason() {
    let fixture = Fixture::new(16).await;
    type Reason = fn(&Unusable) -> bool;
    let cases: [(&str, Reason); 8] = [
        ("fold_version = fold_version + 1", |it| matches!(it, Unusable::FoldVersion { .. })),
        ("log_hash = sha256('another')", |it| matches!(it, Unusable::NotInLog)),
        ("epoch = epoch + 1", |it| matches!(it, Unusable::Version { .. } | Unusable::NotInLog)),
        // It claims to be of another event, which the log does have.
        (
            "position = 11, log_hash = (select hash from weft.event where position = 11)",
            |it| matches!(it, Unusable::Version { found } if found.position == Position(12)),
        ),
        ("body = set_byte(body, 40, get_byte(body, 40) # 1)", |it| matches!(it, Unusable::Hash)),
        ("body = '', body_hash = sha256('')", |it| {
            matches!(it, Unusable::Compression(_) | Unusable::Encoding(_))
        }),
        ("body = 'nonsense', body_hash = sha256('nonsense')", |it| matches!(it, Unusable::Compression(_))),
        ("body = substr(body, 1, 200), body_hash = sha256(substr(body, 1, 200))", |it| {
            matches!(it, Unusable::Compression(_) | Unusable::Encoding(_))
        }),
    ];
    let older = fixture.folded(7).await;
    for (change, is_expected) in cases {
        fixture.sql("delete from weft.fold_checkpoint").await;
        fixture.write(7).await;
        fixture.write(12).await;
        fixture.sql(&format!("update weft.fold_checkpoint set {change} where position = 12")).await;
        let refusal = fixture.refusal().await;
        assert!(is_expected(&refusal), "{change}: {refusal:?}");
        // The older one serves.
        assert_eq!(load(&fixture.store, &fixture.reader, Position(20)).await, older, "{change}");
    }
    fixture.sql("drop table weft.fold_checkpoint").await;
    assert_eq!(load(&fixture.store, &fixture.reader, Position(20)).await, Projection::default());
}

#[tokio::test]
async fn a_body_that_would_not_end_is_cut() {
    // 300 MB of zeros in a few kilobytes.
    let bomb = zstd::bulk::compress(&vec![0; 300 << 20], ZSTD_LEVEL).unwrap();
    assert!(bomb.len() < 64 << 10);
    let refused = decode(&bomb, Hash::of(&bomb)).unwrap_err();
    assert!(matches!(refused, Unusable::Encoding(_)), "{refused:?}");
}

#[tokio::test]
async fn the_newest_are_kept_and_those_of_a_lost_history_are_not() {
    let fixture = Fixture::new(16).await;
    // A writer that ended before it removed the old ones, each time.
    for at in [5, 6, 7, 8, 9] {
        let checkpoint = Checkpoint::of(&fixture.folded(at).await);
        let hash = fixture.hash(at).await;
        write(&fixture.store, checkpoint.clone(), hash).await.unwrap();
        let stored = fixture.store.fold_checkpoints().await.unwrap().remove(0);
        let body = fixture.store.fold_checkpoint_body(Position(at)).await.unwrap().unwrap();
        fixture.sql("create table if not exists kept as table weft.fold_checkpoint with no data").await;
        fixture
            .sql(
                "insert into kept select * from weft.fold_checkpoint as new where not exists \
                     (select from kept where kept.position = new.position)",
            )
            .await;
        // Writing it again changes nothing.
        fixture.store.put_fold_checkpoint(&stored, &body).await.unwrap();
    }
    assert_eq!(fixture.stored().await, [7, 8, 9]);
    fixture.sql("insert into weft.fold_checkpoint select * from kept where position < 7").await;
    assert_eq!(fixture.stored().await, [5, 6, 7, 8, 9]);
    assert_eq!(load(&fixture.store, &fixture.reader, Position(20)).await, fixture.folded(9).await);

    // Of events that the log has lost since.
    fixture.sql("insert into weft.fold_checkpoint select 900, epoch, log_hash, fold_version, body, body_hash, made_at \
                 from kept where position = 9").await;
    fixture.write(14).await;
    assert_eq!(fixture.stored().await, [8, 9, 14]);
}

#[tokio::test(start_paused = true)]
async fn one_is_due_after_enough_events_or_time() {
    let mut keeper = Keeper::new();
    assert!(!keeper.is_due(Position(EVENTS - 1)));
    assert!(keeper.is_due(Position(EVENTS)));
    keeper.begin_at(Position(100));
    assert!(!keeper.is_due(Position(101)));
    tokio::time::advance(AFTER).await;
    assert!(keeper.is_due(Position(101)));
    assert!(!keeper.is_due(Position(100)), "nothing has happened since");
    assert!(!keeper.is_due(Position(7)), "nor where the log has become shorter");
}

#[test]
fn a_refusal_says_why() {
    let refusal = Unusable::Version { found: ConfigVersion::new(Epoch(1), Position(7)) };
    assert_eq!(refusal.to_string(), "its body is of 1.7");
}
