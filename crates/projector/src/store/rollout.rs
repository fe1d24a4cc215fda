//! What canaries of a rollout said that they met with.

use sqlx::Row;
use std::collections::BTreeMap;
use std::time::Duration;
use weft_model::rollout::{Evidence, Witnessed};
use weft_model::{InstanceId, Position, Timestamp};

use super::{Store, StoreError, failed};

/// What a canary last said to a controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CanaryWord {
    /// Whether it runs the rollout's policies.
    pub applied: bool,
    /// Why it refused to.
    pub error: Option<String>,
    /// What it met with since; none if it did not say.
    pub evidence: Option<Evidence>,
}

impl Store {
    /// Writes what canaries of a rollout said. What they met with only grows: of a process that was restarted, the larger of what it
    /// says and what was said stands. What was said of earlier rollouts is forgotten, and does not replace a word of a later one.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn put_rollout_evidence(
        &self,
        rollout: Position,
        canaries: &[(InstanceId, CanaryWord)],
    ) -> Result<(), StoreError> {
        const FORGET: &str = "delete from weft.rollout_evidence where rollout < $1";
        const PUT: &str = "insert into weft.rollout_evidence as row \
             (instance, rollout, applied_at, error, connections, refused, failed, seen_at) \
             select instance, $2, case when applied then clock_timestamp() end, error, connections, refused, failed, \
             clock_timestamp() \
             from unnest($1::text[], $3::boolean[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[]) \
             as new (instance, applied, error, connections, refused, failed) \
             on conflict (instance) do update set applied_at = \
             case when excluded.applied_at is not null then coalesce(row.applied_at, excluded.applied_at) end, \
             error = excluded.error, connections = greatest(row.connections, excluded.connections), \
             refused = greatest(row.refused, excluded.refused), failed = greatest(row.failed, excluded.failed), \
             seen_at = excluded.seen_at where row.rollout = excluded.rollout";
        let failed = failed("record what canaries said");
        let rollout = rollout.0.cast_signed();
        let number = |of: fn(&Evidence) -> u64| -> Vec<Option<i64>> {
            let bounded = |number| i64::try_from(number).unwrap_or(i64::MAX);
            canaries.iter().map(|(_, word)| word.evidence.as_ref().map(of).map(bounded)).collect()
        };
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        sqlx::query(FORGET).bind(rollout).execute(&mut *transaction).await.map_err(&failed)?;
        sqlx::query(PUT)
            .bind(canaries.iter().map(|(canary, _)| canary.to_string()).collect::<Vec<_>>())
            .bind(rollout)
            .bind(canaries.iter().map(|(_, word)| word.applied).collect::<Vec<_>>())
            .bind(canaries.iter().map(|(_, word)| word.error.clone()).collect::<Vec<_>>())
            .bind(number(|it| it.connections))
            .bind(number(|it| it.refused))
            .bind(number(|it| it.failed))
            .execute(&mut *transaction)
            .await
            .map_err(&failed)?;
        transaction.commit().await.map_err(&failed)
    }

    /// Forgets what was said of rollouts after the running one: they are of a history that is no more. For whoever leads; one that is
    /// behind knows of an earlier rollout only.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_rollouts_after(&self, rollout: Position) -> Result<(), StoreError> {
        const FORGET: &str = "delete from weft.rollout_evidence where rollout > $1";
        let forgotten = sqlx::query(FORGET).bind(rollout.0.cast_signed()).execute(&self.pool).await;
        forgotten.map(drop).map_err(failed("forget what canaries said of a history that is no more"))
    }

    /// What canaries of the running rollout said so far, and the time by the database's clock. Who was not heard of for `silent_after` is
    /// not believed to run it.
    ///
    /// # Errors
    /// If the database fails, or a row is not one that a controller writes.
    pub async fn rollout_evidence(
        &self,
        rollout: Position,
        silent_after: Duration,
    ) -> Result<(Timestamp, BTreeMap<InstanceId, Witnessed>), StoreError> {
        const NOW: &str = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
        const READ: &str = "select instance, error, connections, refused, failed, \
             case when seen_at > clock_timestamp() - make_interval(secs => $2) \
             then (extract(epoch from clock_timestamp() - applied_at) * 1000)::bigint end \
             from weft.rollout_evidence where rollout = $1";
        let failed = failed("read what canaries said");
        let rollout = rollout.0.cast_signed();
        let now: i64 = sqlx::query_scalar(NOW).fetch_one(&self.pool).await.map_err(&failed)?;
        let rows = sqlx::query(READ).bind(rollout).bind(silent_after.as_secs_f64());
        let rows = rows.fetch_all(&self.pool).await.map_err(&failed)?;
        let canaries = rows.iter().map(witnessed).collect::<Result<_, _>>()?;
        Ok((Timestamp(now), canaries))
    }
}

fn witnessed(row: &sqlx::postgres::PgRow) -> Result<(InstanceId, Witnessed), StoreError> {
    let name: String = row.get(0);
    let Ok(instance) = name.parse() else {
        return Err(StoreError::Row { table: "weft.rollout_evidence", key: name });
    };
    let number = |column: usize| row.get::<Option<i64>, _>(column).and_then(|it| u64::try_from(it).ok());
    let evidence = number(2).zip(number(3)).zip(number(4)).map(|((connections, refused), failed)| Evidence {
        connections,
        refused,
        failed,
    });
    let watched = number(5).map(Duration::from_millis);
    Ok((instance, Witnessed { watched, error: row.get(1), evidence }))
}
