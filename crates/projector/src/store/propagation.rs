//! How versions reached sidecars: each controller writes what it saw of its own, the view puts the parts together.

use sqlx::Row;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;
use weft_model::{ConfigVersion, InstanceId};

use super::{Store, StoreError, failed, version};

/// Versions that are kept, whatever their age: a day of a mesh that changes every nine seconds. More than an operator looks
/// through, and few enough to be read at once.
const VERSIONS_MAX: i64 = 10_000;

/// How one version reached the sidecars of one controller so far.
#[derive(Clone, Debug, PartialEq)]
pub struct PropagationRow {
    /// The version.
    pub version: ConfigVersion,
    /// When this controller had folded it.
    pub folded_at: Instant,
    /// When this controller told its sidecars.
    pub published_at: Instant,
    /// How many sidecars it changed something for, in the whole mesh.
    pub interested: usize,
    /// How many of this controller's had applied it how long after they were told.
    pub applied: Vec<(Duration, u32)>,
    /// The last of them, and how long it took.
    pub last: Option<(InstanceId, Duration)>,
}

/// How a version reached its sidecars, put together. Times are milliseconds since the append.
#[derive(Clone, Debug, PartialEq)]
pub struct Propagation {
    /// The version.
    pub version: ConfigVersion,
    /// The type of the event that made it, and its scope; empty in sealed history.
    pub event: String,
    /// Its scope.
    pub scope: String,
    /// When it was appended, in milliseconds since the Unix epoch.
    pub appended_at_ms: i64,
    /// Until it was folded.
    pub folded_ms: f64,
    /// Until sidecars were told.
    pub published_ms: f64,
    /// Until half of those that applied it had.
    pub p50_ms: Option<f64>,
    /// Until 99 of 100 had.
    pub p99_ms: Option<f64>,
    /// Until the last one had.
    pub last_ms: Option<f64>,
    /// Which one that was.
    pub last_sidecar: String,
    /// How many sidecars it changed something for.
    pub interested: u64,
    /// How many have applied it.
    pub applied: u64,
}

impl Store {
    /// Writes how versions reached the sidecars of the controller with this id.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn put_propagation(&self, controller: Uuid, rows: &[PropagationRow]) -> Result<(), StoreError> {
        const CLOCK: &str = "select (extract(epoch from clock_timestamp()) * 1000000)::bigint";
        const SQL: &str = "insert into weft.propagation (epoch, position, controller_id, folded_at, published_at, \
             interested, applied_ms, sidecars, last_ms, last_sidecar) \
             select epoch, position, $1, to_timestamp(folded_us / 1e6), to_timestamp(published_us / 1e6), interested, \
             applied_ms::real[], sidecars::bigint[], last_ms, last_sidecar \
             from unnest($2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[], $8::text[], \
             $9::real[], $10::text[]) as new (epoch, position, folded_us, published_us, interested, applied_ms, sidecars, \
             last_ms, last_sidecar) \
             on conflict (epoch, position, controller_id) do update set applied_ms = excluded.applied_ms, \
             sidecars = excluded.sidecars, last_ms = excluded.last_ms, last_sidecar = excluded.last_sidecar";
        if rows.is_empty() {
            return Ok(());
        }
        let failed = failed("record how changes reached sidecars");
        let mut connection = self.pool.acquire().await.map_err(&failed)?;
        // The log's times are the database's, so all times are put on its clock; off by half of this round trip at most.
        let asked = Instant::now();
        let database: i64 = sqlx::query_scalar(CLOCK).fetch_one(&mut *connection).await.map_err(&failed)?;
        let answered = Instant::now();
        let middle = asked + (answered - asked) / 2;
        let on_its_clock = |at: Instant| database - micros(middle.saturating_duration_since(at));
        let array = |row: &PropagationRow, of: &dyn Fn(&(Duration, u32)) -> String| {
            let values: Vec<_> = row.applied.iter().map(of).collect();
            format!("{{{}}}", values.join(","))
        };
        let column = |of: &dyn Fn(&PropagationRow) -> i64| rows.iter().map(of).collect::<Vec<i64>>();
        let put = sqlx::query(SQL)
            .bind(controller)
            .bind(column(&|row| row.version.epoch.0.cast_signed()))
            .bind(column(&|row| row.version.position.0.cast_signed()))
            .bind(column(&|row| on_its_clock(row.folded_at)))
            .bind(column(&|row| on_its_clock(row.published_at)))
            .bind(column(&|row| i64::try_from(row.interested).unwrap_or(i64::MAX)))
            .bind(
                rows.iter()
                    .map(|row| array(row, &|(after, _)| millis(*after).to_string()))
                    .collect::<Vec<_>>(),
            )
            .bind(rows.iter().map(|row| array(row, &|(_, count)| count.to_string())).collect::<Vec<_>>())
            .bind(
                rows.iter().map(|row| row.last.as_ref().map(|(_, after)| millis(*after))).collect::<Vec<_>>(),
            )
            .bind(rows.iter().map(|row| row.last.as_ref().map(|(id, _)| id.to_string())).collect::<Vec<_>>());
        put.execute(&mut *connection).await.map(|_| ()).map_err(&failed)
    }

    /// Forgets how versions reached sidecars that were published a day ago, or many versions ago.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_propagation(&self) -> Result<(), StoreError> {
        const SQL: &str = "delete from weft.propagation where published_at < greatest( \
             clock_timestamp() - interval '1 day', \
             (select published_at from weft.propagation order by published_at desc offset $1 limit 1))";
        let forgotten = sqlx::query(SQL).bind(VERSIONS_MAX).execute(&self.pool).await;
        forgotten.map(|_| ()).map_err(failed("forget how changes reached sidecars"))
    }

    /// How the newest versions reached sidecars, the newest first; the same answer as `status.propagation`.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn propagation(&self, newest: u32) -> Result<Vec<Propagation>, StoreError> {
        const OLDEST: &str = "select min(position) from \
             (select distinct epoch, position from weft.propagation order by epoch desc, position desc limit $1) as newest";
        const SQL: &str = "select version, coalesce(event, ''), coalesce(scope, ''), \
             (extract(epoch from appended_at) * 1000)::bigint, folded_ms, published_ms, applied_p50_ms, applied_p99_ms, \
             applied_last_ms, coalesce(last_sidecar, ''), interested, applied, \
             split_part(version, '.', 1)::bigint, position \
             from status.propagation where position >= $2 \
             order by split_part(version, '.', 1)::bigint desc, position desc limit $1";
        let failed = failed("read how changes reached sidecars");
        let newest = i64::from(newest);
        let oldest = sqlx::query_scalar::<_, Option<i64>>(OLDEST).bind(newest).fetch_one(&self.pool).await;
        let Some(oldest) = oldest.map_err(&failed)? else { return Ok(Vec::new()) };
        let rows = sqlx::query(SQL).bind(newest).bind(oldest).fetch_all(&self.pool).await.map_err(&failed)?;
        let decode = |row: sqlx::postgres::PgRow| Propagation {
            version: version(row.get(12), row.get(13)),
            event: row.get(1),
            scope: row.get(2),
            appended_at_ms: row.get(3),
            folded_ms: row.get(4),
            published_ms: row.get(5),
            p50_ms: row.get(6),
            p99_ms: row.get(7),
            last_ms: row.get(8),
            last_sidecar: row.get(9),
            interested: row.get::<i64, _>(10).cast_unsigned(),
            applied: row.get::<i64, _>(11).cast_unsigned(),
        };
        Ok(rows.into_iter().map(decode).collect())
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Exact for what is rounded to quarters, up to hours.
fn millis(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1_000.0
}
