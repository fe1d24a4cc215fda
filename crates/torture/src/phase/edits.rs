//! Hostile edits: what somebody who owns the database can do to the log with its triggers off, one edit at a time.
//!
//! Each must be found by the verification, at the first position that it touches; then it is undone, and nothing may be
//! found any more.

use anyhow::Context;
use futures_util::TryStreamExt as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::time::Duration;
use weft_eventlog::{
    AppendRequest, ArchiveConfig, EventLog, LogConfig, NewEvent, Reader, RecordedEvent, ScopeAppend,
    UnixMicros, VerifyError, archive, verify,
};
use weft_model::version::{Epoch, ExpectedVersion, Position, Version};

use super::Findings;
use crate::server::{Postgres, Session};

const DATABASE: &str = "edits";
/// Commands in the log, of one to three events each.
const COMMANDS: usize = 120;
const TABLES: [&str; 4] = ["event", "log_batch", "log_epoch", "log_segment"];
/// Positions in a range: some are sealed.
const RANGE: u32 = 32;
/// What is only written down about a segment, and nothing follows from.
const SEGMENT_NOTES: [&str; 1] = ["sealed_at"];

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
    server.make_log(DATABASE, RANGE).await?;
    let url = server.url(DATABASE)?;
    fill(&url, &mut rng).await?;
    // The first third of it; how many events that is is up to the ranges.
    let sealed = seal_some(&url).await?;
    let session = Session::open(&url).await?;
    for table in TABLES {
        let sql = format!(
            "create table kept_{table} as select * from weft.{table}; alter table weft.{table} disable trigger append_only"
        );
        session.client.batch_execute(&sql).await?;
    }
    // It would refuse some of what an intruder, who can drop it too, is free to do.
    drop_unique(&session).await?;
    let reader = Reader::new(url.parse()?);
    let log: Vec<Vec<RecordedEvent>> =
        reader.stream(Position::ZERO, Position(u64::MAX)).try_collect().await?;
    let log = log.concat();
    let author = Author {
        columns: columns(&session, "event").await?,
        batch_columns: columns(&session, "log_batch").await?,
        segment_columns: columns(&session, "log_segment").await?,
        batches: batches(&session).await?,
        segments: segments(&session).await?,
        forks: forks(&session).await?,
        sealed,
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
    pairs(session, SQL).await
}

/// Invents edits.
struct Author {
    columns: Vec<(String, String)>,
    batch_columns: Vec<(String, String)>,
    segment_columns: Vec<(String, String)>,
    batches: Vec<(u64, u64)>,
    segments: Vec<(u64, u64)>,
    /// Every epoch and the position after which it was opened.
    forks: Vec<(u64, u64)>,
    /// The last event that is sealed, hence no row.
    sealed: u64,
    log: Vec<RecordedEvent>,
}

impl Author {
    fn invent(&self, rng: &mut StdRng) -> Edit {
        let head = self.log.len() as u64;
        let at = rng.random_range(self.sealed + 1..=head);
        match rng.random_range(0..11) {
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
            8 => self.segment(rng),
            9 => self.epoch(rng),
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
        let other = rng.random_range(self.sealed + 1..=self.log.len() as u64);
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
        // Of what is sealed no fingerprint is known, so nothing that rests on them is looked at.
        let of_rows = |column: &str| ["marks", "marks_format", "commands_hash"].contains(&column);
        let columns = self.batch_columns.iter().filter(|(column, _)| first > self.sealed || !of_rows(column));
        let Some((column, kind)) = columns.collect::<Vec<_>>().choose(rng).copied() else {
            return self.insert(self.log.len() as u64);
        };
        let value = match column.as_str() {
            "marks_format" => "3 - marks_format".to_owned(),
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

impl Author {
    /// What is sealed.
    fn segment(&self, rng: &mut StdRng) -> Edit {
        let Some((first, last)) = self.segments.choose(rng).copied() else { return self.insert(1) };
        // Which of its events is meant cannot be told where all of them are one.
        let found = first..=last + 1;
        if rng.random_bool(0.2) {
            let sql = format!("delete from weft.log_segment where first_position = {first}");
            return Edit { kind: "delete segment".into(), sql, found };
        }
        let columns = self.segment_columns.iter().filter(|(name, _)| !SEGMENT_NOTES.contains(&name.as_str()));
        let Some((column, kind)) = columns.collect::<Vec<_>>().choose(rng).copied() else {
            return self.insert(self.log.len() as u64);
        };
        let value = match column.as_str() {
            // As the table demands, and beyond what any other has.
            "first_position" => "first_position + 1".to_owned(),
            "last_position" => "last_position + 1000000".to_owned(),
            _ => value(rng, column, kind),
        };
        let sql = format!("update weft.log_segment set {column} = {value} where first_position = {first}");
        Edit { kind: format!("update segment {column}"), sql, found }
    }

    /// What each epoch found when it was opened.
    fn epoch(&self, rng: &mut StdRng) -> Edit {
        let Some((epoch, fork)) = self.forks.choose(rng).copied() else { return self.insert(1) };
        let (kind, change) = match rng.random_range(0..4) {
            0 => ("delete", "delete from weft.log_epoch".to_owned()),
            1 => ("update fork_hash", "update weft.log_epoch set fork_hash = sha256('forged')".to_owned()),
            2 => (
                "update fork_position",
                "update weft.log_epoch set fork_position = fork_position + 1".to_owned(),
            ),
            _ => ("update epoch", "update weft.log_epoch set epoch = epoch + 1000".to_owned()),
        };
        let sql = format!("{change} where epoch = {epoch}");
        Edit { kind: format!("{kind} of an epoch"), sql, found: fork..=fork + 1 }
    }
}

/// Seals every full range but the last ones: about a third of the log.
async fn seal_some(url: &str) -> anyhow::Result<u64> {
    let session = Session::open(url).await?;
    let head: i64 = session.client.query_one("select max(position) from weft.event", &[]).await?.get(0);
    // Ranges are sealed in order, as long as each is wholly as old as is asked for.
    let age = "select greatest(extract(epoch from clock_timestamp() - recorded_at), 0)::float8 from weft.event where position = $1";
    let age: f64 = session.client.query_one(age, &[&(head / 3)]).await?.get(0);
    let older_than = Duration::from_secs_f64(age);
    let config = ArchiveConfig { connect: url.parse()?, older_than, forget_outcomes: true };
    let sealed = archive(&config, |_| ()).await?.sealed.0;
    anyhow::ensure!(sealed > 0 && sealed < head.cast_unsigned(), "sealed up to {sealed} of {head}");
    Ok(sealed)
}

async fn drop_unique(session: &Session) -> anyhow::Result<()> {
    const SQL: &str = "select format('drop index weft.%I', indexname) from pg_indexes where schemaname = 'weft' \
                       and indexdef like 'CREATE UNIQUE INDEX % (scope, version)'";
    for row in session.client.query(SQL, &[]).await? {
        session.client.batch_execute(row.get(0)).await?;
    }
    Ok(())
}

async fn pairs(session: &Session, sql: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let rows = session.client.query(sql, &[]).await?;
    let number = |row: &tokio_postgres::Row, at| row.get::<_, i64>(at).cast_unsigned();
    Ok(rows.iter().map(|row| (number(row, 0), number(row, 1))).collect())
}

async fn segments(session: &Session) -> anyhow::Result<Vec<(u64, u64)>> {
    pairs(session, "select first_position, last_position from weft.log_segment order by 1").await
}

/// Those in which something was recorded: of the others nothing in the log tells.
async fn forks(session: &Session) -> anyhow::Result<Vec<(u64, u64)>> {
    pairs(
        session,
        "select epoch, fork_position from weft.log_epoch where epoch in (select epoch from weft.log_batch) order by 1",
    )
    .await
}

/// Another value for a column.
fn value(rng: &mut StdRng, column: &str, kind: &str) -> String {
    match (column, kind) {
        // Beyond the end, where there is room.
        ("position", _) => {
            format!("(select max(position) from weft.event) + {}", rng.random_range(1..10))
        }
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
