use super::*;
use crate::fixture::Fixture;
use crate::verify::{Difference, verify_rows};
use std::time::Duration;
use tokio::task::JoinSet;
use weft_model::Event;
use weft_model::health::{Health, HealthEvent};
use weft_routing::Projection;
use weft_testkit::wait_until;

/// Longest wait for anything; reached only by a test that fails.
const LIMIT: Duration = Duration::from_secs(30);

/// A projector that runs.
struct Running {
    view: View,
    drain: CancellationToken,
    task: JoinSet<Result<(), Arc<Fault>>>,
}

impl Running {
    fn start(fixture: &Fixture, every: u64) -> Self {
        let (view, drain) = (View::new(), CancellationToken::new());
        let (reader, store) = (fixture.reader.clone(), fixture.store.clone());
        let mut projector = Projector::new(reader, store, view.clone(), "c1", Uuid::new_v4());
        projector.keeper.every = every;
        let mut task = JoinSet::new();
        task.spawn(projector.run(drain.clone()));
        Self { view, drain, task }
    }

    async fn published(&self, position: Position) {
        let mut publications = self.view.publications();
        let reached = publications.wait_for(|version| version.position >= position);
        tokio::time::timeout(LIMIT, reached).await.unwrap().unwrap();
    }

    async fn stop(mut self) {
        self.drain.cancel();
        self.task.join_next().await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_leader_keeps_checkpoints_and_a_start_goes_on_from_them() {
    let fixture = Fixture::new(16).await;
    let first = Running::start(&fixture, 8);
    wait_until("a checkpoint of the fold", LIMIT, async || fixture.stored().await == [20]).await;
    for revision in 17..=24 {
        fixture.report(revision).await;
    }
    wait_until("the next one", LIMIT, async || fixture.stored().await == [20, 28]).await;
    let folded = fixture.folded(28).await;
    first.view.read(|view| assert_eq!(*view, folded));
    first.stop().await;
    assert_eq!(verify_rows(&fixture.reader, &fixture.store, |_| ()).await.unwrap().differences, []);

    fixture.report(25).await;
    let second = Running::start(&fixture, u64::MAX);
    second.published(Position(29)).await;
    let folded = fixture.folded(29).await;
    second.view.read(|view| assert_eq!(*view, folded));
    let instance = "default/api/one".parse().unwrap();
    let wanted = folded.wanted(&instance).unwrap().version;
    assert_eq!(second.view.published(|published| published.wanted(&instance).unwrap().version), wanted);
    second.stop().await;
}

#[tokio::test]
async fn a_start_is_right_whatever_is_stored() {
    let fixture = Fixture::new(16).await;
    let first = Running::start(&fixture, 4);
    wait_until("a checkpoint of the fold", LIMIT, async || fixture.stored().await == [20]).await;
    first.stop().await;
    fixture.report(17).await;
    let head = fixture.head().await;
    let folded = fixture.folded(head.0).await;
    for change in [
        "update weft.fold_checkpoint set body = 'nonsense'",
        "update weft.fold_checkpoint set body_hash = sha256(body), log_hash = sha256('')",
        "update weft.fold_checkpoint set fold_version = 9999, position = 9999",
        "drop table weft.fold_checkpoint",
    ] {
        fixture.sql(change).await;
        let next = Running::start(&fixture, u64::MAX);
        next.published(head).await;
        next.view.read(|view| assert_eq!(*view, folded, "{change}"));
        next.stop().await;
    }
}

#[tokio::test]
async fn verification_tells_a_checkpoint_that_the_log_does_not_fold_to() {
    let fixture = Fixture::new(16).await;
    let running = Running::start(&fixture, u64::MAX);
    running.published(Position(20)).await;
    running.stop().await;

    // As a faulty fold would have left it: all its hashes are right.
    let mut facts = fixture.facts().await;
    facts.truncate(12);
    let Event::Health(HealthEvent::HealthReported(report)) = &mut facts[11].event else { unreachable!() };
    report.health = if report.health == Health::Healthy { Health::Unhealthy } else { Health::Healthy };
    let mut wrong = Projection::default();
    wrong.apply(&facts).unwrap();
    let hash = fixture.hash(12).await;
    crate::checkpoint::write(&fixture.store, Checkpoint::of(&wrong), hash).await.unwrap();
    let right = Checkpoint::of(&fixture.folded(15).await);
    crate::checkpoint::write(&fixture.store, right, fixture.hash(15).await).await.unwrap();

    let found = verify_rows(&fixture.reader, &fixture.store, |_| ()).await.unwrap().differences;
    assert_eq!(found, [Difference::Checkpoint { position: Position(12) }]);
}
