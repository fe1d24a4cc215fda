//! Hostile edits: what somebody who owns the database can do to the log with its triggers off, one edit at a time.
//!
//! Each must be found by the verification, at the first position that it touches; then it is undone, and nothing may be
//! found any more.

use anyhow::Context;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use weft_eventlog::{
    AppendRequest, EventLog, LogConfig, NewEvent, Reader, RecordedEvent, ScopeAppend, UnixMicros,
    VerifyError, verify,
};
use weft_model::version::{Epoch, ExpectedVersion, Position, Version};

use super::Findings;
use crate::server::{Postgres, Session};

const DATABASE: &str = "edits";
/// Commands in the log, of one to three events each.
const COMMANDS: usize = 120;
const TABLES: [&str; 3] = ["event", "log_batch", "log_epoch"];

/// An edit: what it is called, the statements, and the positions at the first of which it must be found.
struct Edit {
    kind: String,
    sql: String,
    found: std::ops::RangeInclusive<u64>,
}

/// So many edits of all kinds.
pub(crate) async fn edits(
    server: &Postgres,
    seed: u64,
    count: u64,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    server.make_log(DATABASE).await?;
    let url = server.url(DATABASE)?;
    fill(&url, &mut rng).await?;
    let session = Session::open(&url).await?;
    for table in TABLES {
        let sql = format!(
            "create table kept_{table} as select * from weft.{table}; alter table weft.{table} disable trigger append_only"
        );
        session.client.batch_execute(&sql).await?;
    }
    // It would refuse some of what an intruder, who can drop it too, is free to do.
    session.client.batch_execute("drop index weft.event_1_scope_version_idx").await?;
    let reader = Reader::new(url.parse()?);
    let log = reader.read(Position::ZERO, 4_096).await?;
    let author = Author {
        columns: columns(&session, "event").await?,
        batch_columns: columns(&session, "log_batch").await?,
        batches: batches(&session).await?,
        log,
    };
    let mut made = 0;
    while made < count {
        let edit = author.invent(&mut rng);
        let changed = apply(&session, &edit).await.with_context(|| edit.sql.clone())?;
        // Two equal events that change places are as they were.
        if !changed {
            continue;
        }
        made += 1;
        match verify(&reader, |_| ()).await {
            Err(VerifyError::Damaged { position, .. }) if edit.found.contains(&position.0) => {
                findings.count("found");
                findings.count(&edit.kind);
            }
            Err(VerifyError::Damaged { position, defect }) => {
                let told = format!("{}: found at {position} ({defect}), not in {:?}", edit.sql, edit.found);
                findings.complain(told);
            }
            Err(VerifyError::Store(error)) => findings.complain(format!("{}: {error}", edit.sql)),
            Ok(_) => findings.complain(format!("{}: not found", edit.sql)),
        }
        undo(&session).await?;
    }
    if let Err(error) = verify(&reader, |_| ()).await {
        findings.complain(format!("what was undone is not as it was: {}", weft_model::Chain(&error)));
    }
    findings.events += author.log.len() as u64;
    Ok(())
}

/// Runs an edit; false if it changed nothing.
async fn apply(session: &Session, edit: &Edit) -> anyhow::Result<bool> {
    session.client.batch_execute(&format!("begin; {}; commit", edit.sql)).await?;
    let differ = TABLES.map(|table| {
        format!(
            "(select count(*) from weft.{table}) <> (select count(*) from kept_{table}) or exists \
             (select md5(t::text) from weft.{table} as t except all select md5(k::text) from kept_{table} as k)"
        )
    });
    let row = session.client.query_one(&format!("select {}", differ.join(" or ")), &[]).await?;
    Ok(row.get(0))
}

async fn undo(session: &Session) -> anyhow::Result<()> {
    let restore = TABLES.map(|table| {
        format!("delete from weft.{table}; insert into weft.{table} select * from kept_{table}")
    });
    Ok(session.client.batch_execute(&format!("begin; {}; commit", restore.join("; "))).await?)
}

/// A log of several epochs, scopes and sizes of commands.
async fn fill(url: &str, rng: &mut StdRng) -> anyhow::Result<()> {
    let log = EventLog::open(LogConfig::new(url.parse()?)).await?;
    let appender = log.appender();
    let session = Session::open(url).await?;
    for n in 0..COMMANDS {
        if n == COMMANDS / 3 || n == 2 * COMMANDS / 3 {
            // What a start of the server does.
            let opened = "insert into weft.log_epoch select epoch + 1, system_identifier, timeline + 1, postmaster_start, \
                 event_table, (select max(position) from weft.event), \
                 (select hash from weft.event order by position desc limit 1), clock_timestamp() \
                 from weft.log_epoch order by epoch desc limit 1";
            session.client.batch_execute(opened).await?;
        }
        let scope = |name: u32, events: u32| ScopeAppend {
            scope: format!("scope/{name}"),
            expected: ExpectedVersion::Any,
            events: (0..events)
                .map(|n| NewEvent {
                    event_type: "Happened".into(),
                    schema: 1,
                    payload: format!("{{\"n\":{n}}}"),
                })
                .collect(),
        };
        let first = rng.random_range(0..5);
        let request = AppendRequest {
            command_id: uuid::Uuid::now_v7(),
            fingerprint: None,
            actor: format!("actor {}", rng.random_range(0..3)),
            reason: rng.random_bool(0.5).then(|| "because".to_owned()),
            cause: (n > 0).then_some(Position(1)),
            scopes: vec![scope(first, rng.random_range(1..=2)), scope(first + 5, rng.random_range(0..=1))],
        };
        // Now and then several at once, so that some batches hold several commands.
        if n % 4 == 0 {
            let mut other = request.clone();
            other.command_id = uuid::Uuid::now_v7();
            let (a, b) = tokio::join!(appender.append(request), appender.append(other));
            a.and(b)?;
        } else {
            appender.append(request).await?;
        }
    }
    log.shutdown().await;
    Ok(())
}

/// The columns of a table with their types, from the catalog: one that is added later is attacked as well.
async fn columns(session: &Session, table: &str) -> anyhow::Result<Vec<(String, String)>> {
    const SQL: &str = "select column_name::text, data_type::text from information_schema.columns \
                       where table_schema = 'weft' and table_name = $1 order by ordinal_position";
    let rows = session.client.query(SQL, &[&table]).await?;
    anyhow::ensure!(!rows.is_empty(), "there is no table weft.{table}");
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn batches(session: &Session) -> anyhow::Result<Vec<(u64, u64)>> {
    const SQL: &str = "select first_position, last_position from weft.log_batch order by 2";
    let rows = session.client.query(SQL, &[]).await?;
    let position = |row: &tokio_postgres::Row, at| row.get::<_, i64>(at).cast_unsigned();
    Ok(rows.iter().map(|row| (position(row, 0), position(row, 1))).collect())
}

/// Invents edits.
struct Author {
    columns: Vec<(String, String)>,
    batch_columns: Vec<(String, String)>,
    batches: Vec<(u64, u64)>,
    log: Vec<RecordedEvent>,
}

impl Author {
    fn invent(&self, rng: &mut StdRng) -> Edit {
        let head = self.log.len() as u64;
        let at = rng.random_range(1..=head);
        match rng.random_range(0..9) {
            0 | 1 => self.update(rng, at),
            2 => Edit {
                kind: "delete".into(),
                sql: format!("delete from weft.event where position = {at}"),
                found: at..=at,
            },
            3 => {
                let from = rng.random_range(head.saturating_sub(5)..=head);
                let sql = format!("delete from weft.event where position >= {from}");
                Edit { kind: "cut off".into(), sql, found: from..=from }
            }
            4 => self.insert(head),
            5 => self.swap(rng, at),
            6 => self.forge(rng, at, false),
            7 => self.forge(rng, at, true),
            _ => self.witness(rng),
        }
    }

    fn update(&self, rng: &mut StdRng, at: u64) -> Edit {
        let Some((column, kind)) = self.columns.choose(rng) else { return self.insert(at) };
        let value = value(rng, column, kind);
        // A value that PostgreSQL refuses as such is no edit.
        let sql = format!("update weft.event set {column} = {value} where position = {at}");
        Edit { kind: format!("update {column}"), sql, found: at..=at }
    }

    /// A right-looking event after the last one.
    fn insert(&self, head: u64) -> Edit {
        let last = &self.log[self.log.len() - 1];
        let mut added = last.clone();
        (added.position, added.version) = (Position(head + 1), last.version.next());
        added.hash = added.expected_hash(last.hash);
        let sql = format!(
            "insert into weft.event (position, epoch, version, recorded_at, cause, command_id, fingerprint, command_events, \
             schema, hash, scope, type, actor, reason, payload) select {}, epoch, {}, recorded_at, cause, gen_random_uuid(), \
             fingerprint, command_events, schema, '\\x{}', scope, type, actor, reason, payload from weft.event \
             where position = {head}",
            head + 1,
            added.version,
            added.hash
        );
        Edit { kind: "insert".into(), sql, found: head + 1..=head + 1 }
    }

    fn swap(&self, rng: &mut StdRng, at: u64) -> Edit {
        let other = rng.random_range(1..=self.log.len() as u64);
        let (low, high) = (at.min(other), at.max(other));
        let others: Vec<&str> = self
            .columns
            .iter()
            .map(|(column, _)| column.as_str())
            .filter(|column| *column != "position")
            .collect();
        let list = others.join(", ");
        let sources = others.iter().map(|column| format!("o.{column}")).collect::<Vec<_>>().join(", ");
        // A cause that is not before its event is refused by the table; then there is no swap.
        let sql = format!(
            "update weft.event as e set ({list}) = (select {sources} from kept_event as o where o.position = \
             case e.position when {low} then {high} else {low} end) where e.position in ({low}, {high}) and {high} > 1 \
             and (select cause from kept_event where position = {high}) is null = \
             ((select cause from kept_event where position = {low}) is null)"
        );
        Edit { kind: "swap".into(), sql, found: low..=low }
    }

    /// The content of an event is another one, and its hash fits; of all the later ones too, if `chain`.
    fn forge(&self, rng: &mut StdRng, at: u64, chain: bool) -> Edit {
        let index = usize::try_from(at).unwrap_or(1) - 1;
        let before = index.checked_sub(1).map(|before| self.log[before].hash);
        let mut hash = before.unwrap_or(weft_eventlog::EventHash::GENESIS);
        let mut forged = self.log[index].clone();
        match rng.random_range(0..6) {
            0 => forged.payload = "{\"n\":666}".into(),
            1 => forged.actor = "mallory".into(),
            2 => forged.recorded_at = UnixMicros(forged.recorded_at.0 + 1),
            3 => forged.event_type = "NeverHappened".into(),
            4 => forged.version = Version(forged.version.0 + 1),
            _ => forged.epoch = Epoch(forged.epoch.0 + 1),
        }
        hash = forged.expected_hash(hash);
        let mut statements = vec![format!(
            "update weft.event set payload = '{}', actor = '{}', type = '{}', version = {}, epoch = {}, \
             recorded_at = to_timestamp(0) + {} * interval '1 microsecond', hash = '\\x{hash}' where position = {at}",
            forged.payload,
            forged.actor,
            forged.event_type,
            forged.version,
            forged.epoch,
            forged.recorded_at.0
        )];
        if chain {
            for later in &self.log[index + 1..] {
                hash = later.expected_hash(hash);
                statements.push(format!(
                    "update weft.event set hash = '\\x{hash}' where position = {}",
                    later.position
                ));
            }
        }
        let kind = if chain { "forged chain" } else { "forged hash" };
        Edit { kind: kind.into(), sql: statements.join("; "), found: at..=at }
    }

    /// What is written down beside the events.
    fn witness(&self, rng: &mut StdRng) -> Edit {
        let Some((first, last)) = self.batches.choose(rng).copied() else { return self.insert(1) };
        if rng.random_bool(0.2) {
            let sql = format!("delete from weft.log_batch where last_position = {last}");
            // Found where the next one begins, or where its first event has none.
            return Edit { kind: "delete batch".into(), sql, found: first..=last + 1 };
        }
        let Some((column, kind)) = self.batch_columns.choose(rng) else { return self.insert(1) };
        let value = match column.as_str() {
            "marks" => "set_byte(marks, 0, 255 - get_byte(marks, 0))".to_owned(),
            "first_position" => "first_position + 1, marks = substring(marks from 9)".to_owned(),
            "last_position" => {
                "last_position + 1000000, marks = marks || repeat('x', 8000000)::bytea".to_owned()
            }
            _ => value(rng, column, kind),
        };
        let guard = if column == "first_position" { "and first_position < last_position" } else { "" };
        let sql =
            format!("update weft.log_batch set {column} = {value} where last_position = {last} {guard}");
        // Without an end that follows, the batch is in the way of the next ones.
        Edit { kind: format!("update batch {column}"), sql, found: first..=last + 1 }
    }
}

/// Another value for a column.
fn value(rng: &mut StdRng, column: &str, kind: &str) -> String {
    match (column, kind) {
        ("position", _) => format!("position + {}", 100_000 + rng.random_range(0..1_000)),
        ("cause", _) => "case when position > 2 then 2 end".into(),
        ("reason", _) => ["'forged'", "null", "''"].choose(rng).map_or("null", |value| value).to_string(),
        // Both or none, as the table demands. The second one has the same bytes at other places.
        ("fingerprint", _) => {
            let forged =
                ["sha256('forged')", "substring(fingerprint from 9) || substring(fingerprint for 8)"];
            let forged = forged.choose(rng).copied().unwrap_or("null");
            format!("case when fingerprint is null then null else {forged} end")
        }
        ("command_events", _) => {
            "case when command_events is null then null else command_events + 1 end".into()
        }
        (_, "bigint" | "integer" | "smallint") => format!("{column} + {}", rng.random_range(1..5)),
        (_, "timestamp with time zone") => {
            format!("{column} - interval '{} seconds'", rng.random_range(1..100))
        }
        (_, "uuid") => "gen_random_uuid()".into(),
        (_, "bytea") => format!("set_byte({column}, 5, 255 - get_byte({column}, 5))"),
        (_, "json") => "(payload::text || ' ')::json".into(),
        _ => format!("{column} || 'x'"),
    }
}
