//! For tests: a log with a small mesh in it, on a database of its own.

use uuid::Uuid;
use weft_eventlog::{AppendRequest, EventHash, EventLog, LogConfig, NewEvent, Reader, ScopeAppend, migrate};
use weft_model::version::ExpectedVersion;
use weft_model::{Fact, Position};
use weft_routing::Projection;
use weft_testkit::TestDatabase;

use crate::decode::Decoder;
use crate::fold::{FoldFrom, fold_to};
use crate::store::Store;

pub(crate) struct Fixture {
    pub(crate) database: TestDatabase,
    pub(crate) log: EventLog,
    pub(crate) reader: Reader,
    pub(crate) store: Store,
}

impl Fixture {
    /// With `reports` reports of health after the four events that bring a service and an instance up.
    pub(crate) async fn new(reports: u64) -> Self {
        let database = TestDatabase::create().await;
        migrate(&database.url().parse().unwrap()).await.unwrap();
        let log = EventLog::open(LogConfig::new(database.url().parse().unwrap())).await.unwrap();
        let (reader, store) = (log.reader(), Store::new(database.url()).unwrap());
        let fixture = Self { database, log, reader, store };
        let root = r#"{"trust_domain":"weft.local","certificate_pem":"root","sha256":"aa"}"#;
        fixture.append("ca", "RootAdded", root).await;
        let ports = r#"{"ports":[{"name":"main","port":80}]}"#;
        fixture.append("service/default/api", "ServiceDeclared", ports).await;
        let policy = r#"{"policy":{"default":"allow"}}"#;
        fixture.append("security/mesh", "SecurityPolicySet", policy).await;
        let registration = r#"{"address":"10.0.0.1","port":15000,"upstreams":"all"}"#;
        fixture.append("membership/default/api/one", "InstanceRegistered", registration).await;
        for revision in 1..=reports {
            fixture.report(revision).await;
        }
        fixture
    }

    pub(crate) async fn report(&self, revision: u64) {
        let health = if revision.is_multiple_of(3) { "unhealthy" } else { "healthy" };
        let payload = format!(r#"{{"health":"{health}","revision":{revision}}}"#);
        self.append("health/default/api/one", "HealthReported", &payload).await;
    }

    async fn append(&self, scope: &str, event_type: &str, payload: &str) {
        let event = NewEvent { event_type: event_type.into(), schema: 1, payload: payload.into() };
        let part = ScopeAppend { scope: scope.into(), expected: ExpectedVersion::Any, events: vec![event] };
        let request = AppendRequest {
            command_id: Uuid::now_v7(),
            fingerprint: None,
            actor: "spiffe://weft.local/operator/admin/tess".into(),
            reason: None,
            cause: None,
            scopes: vec![part],
        };
        self.log.appender().append(request).await.unwrap();
    }

    pub(crate) async fn head(&self) -> Position {
        self.reader.head().await.unwrap().position
    }

    /// The fold from the first event.
    pub(crate) async fn folded(&self, to: u64) -> Projection {
        fold_to(&self.reader, Position(to), FoldFrom::FirstEvent, |_| ()).await.unwrap()
    }

    pub(crate) async fn facts(&self) -> Vec<Fact> {
        let mut decoder = Decoder::default();
        let events = self.reader.read(Position::ZERO, usize::MAX).await.unwrap();
        events.iter().map(|event| decoder.decode(&event.view()).unwrap()).collect()
    }

    pub(crate) async fn hash(&self, at: u64) -> EventHash {
        self.reader.read(Position(at - 1), 1).await.unwrap()[0].hash
    }

    pub(crate) async fn sql(&self, statements: &str) {
        self.database.connect().await.batch_execute(statements).await.unwrap();
    }

    /// The positions of the stored checkpoints.
    pub(crate) async fn stored(&self) -> Vec<u64> {
        let stored = self.store.fold_checkpoints().await.unwrap();
        stored.iter().rev().map(|stored| stored.version.position.0).collect()
    }
}
