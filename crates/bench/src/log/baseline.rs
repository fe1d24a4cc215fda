//! What the log is compared with: a store that commits one event per transaction, as message-db does.
//!
//! The tables and the function are in `baseline.sql`. A write is one round trip: a prepared call that commits by itself.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::Mutex;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use crate::fleet::Lane;
use crate::store::{Load, Store, Written};
use weft_bench::server::{Database, Session};

/// Which category a stream of the baseline is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Categories {
    /// All streams in one: like our log, it has a total order that readers can follow.
    One,
    /// One for each service: an order for each, and none over all.
    PerService,
}

/// One transaction per event, in tables of its own.
#[derive(Clone)]
pub(crate) struct Baseline {
    categories: Categories,
    connections: Arc<Vec<Mutex<Connection>>>,
}

struct Connection {
    client: Client,
    write: Statement,
    _session: Session,
}

impl Baseline {
    const SQL: &str = include_str!("baseline.sql");
    const WRITE_SQL: &str = "select baseline.write_message($1, $2, $3, $4::text::jsonb, null, $5)";

    /// Makes the tables.
    pub(crate) async fn create(database: &Database) -> anyhow::Result<()> {
        database.run(Self::SQL).await
    }

    /// Connects `connections` times. Callers above that number share: caller n uses connection n modulo their number, and
    /// waits while another one does.
    pub(crate) async fn connect(
        database: &Database,
        categories: Categories,
        connections: usize,
    ) -> anyhow::Result<Self> {
        let mut open = Vec::with_capacity(connections);
        for _ in 0..connections {
            let (client, session) = database.connect().await?;
            let write =
                client.prepare(Self::WRITE_SQL).await.context("cannot prepare the baseline's write")?;
            open.push(Mutex::new(Connection { client, write, _session: session }));
        }
        Ok(Self { categories, connections: Arc::new(open) })
    }

    /// The same connections, with streams in other categories.
    pub(crate) fn with(&self, categories: Categories) -> Self {
        Self { categories, connections: Arc::clone(&self.connections) }
    }
}

impl Store for Baseline {
    async fn write(&self, lane: &mut Lane, _: Load) -> anyhow::Result<Written> {
        let single = lane.report()?;
        let stream = match self.categories {
            Categories::One => format!("mesh-{}", single.scope),
            Categories::PerService => format!("mesh{}-{}", lane.number, single.scope),
        };
        let expected = single.version.cast_signed() - 1;
        let event = &single.event;
        let connection = self.connections[lane.caller % self.connections.len()].lock().await;
        let row = connection
            .client
            .query_one(
                &connection.write,
                &[&Uuid::now_v7(), &stream, &event.event_type, &event.payload, &expected],
            )
            .await
            .context("the baseline refused a write")?;
        anyhow::ensure!(row.get::<_, i64>(0) == expected + 1, "the baseline wrote elsewhere than expected");
        Ok(Written { events: 1, refused: 0 })
    }
}
