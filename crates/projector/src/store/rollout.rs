//! What canaries of a rollout said that they met with.

use sqlx::Row;
use std::collections::BTreeMap;
use weft_model::rollout::{Evidence, Witnessed};
use weft_model::{InstanceId, Position};

use super::{Store, StoreError, failed};

impl Store {
    /// Writes what canaries of a rollout said; what others said of it stays, what was said of earlier ones does not.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn put_rollout_evidence(
        &self,
        rollout: Position,
        canaries: &[(InstanceId, Witnessed)],
    ) -> Result<(), StoreError> {
        const FORGET: &str = "delete from weft.rollout_evidence where rollout < $1";
        const PUT: &str = "insert into weft.rollout_evidence \
             (instance, rollout, applied, error, connections, refused, failed, seen_at) \
             select instance, $2, applied, error, connections, refused, failed, clock_timestamp() \
             from unnest($1::text[], $3::boolean[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[]) \
             as new (instance, applied, error, connections, refused, failed) \
             on conflict (instance) do update set rollout = excluded.rollout, applied = excluded.applied, \
             error = excluded.error, connections = excluded.connections, refused = excluded.refused, \
             failed = excluded.failed, seen_at = excluded.seen_at";
        let failed = failed("record what canaries said");
        let rollout = rollout.0.cast_signed();
        let number = |of: fn(&Evidence) -> u64| -> Vec<i64> {
            let bounded =
                |(_, it): &(InstanceId, Witnessed)| i64::try_from(of(&it.evidence)).unwrap_or(i64::MAX);
            canaries.iter().map(bounded).collect()
        };
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        sqlx::query(FORGET).bind(rollout).execute(&mut *transaction).await.map_err(&failed)?;
        sqlx::query(PUT)
            .bind(canaries.iter().map(|(canary, _)| canary.to_string()).collect::<Vec<_>>())
            .bind(rollout)
            .bind(canaries.iter().map(|(_, it)| it.applied).collect::<Vec<_>>())
            .bind(canaries.iter().map(|(_, it)| it.error.clone()).collect::<Vec<_>>())
            .bind(number(|it| it.connections))
            .bind(number(|it| it.refused))
            .bind(number(|it| it.failed))
            .execute(&mut *transaction)
            .await
            .map_err(&failed)?;
        transaction.commit().await.map_err(&failed)
    }

    /// What canaries of a rollout said so far.
    ///
    /// # Errors
    /// If the database fails, or a row is not one that a controller writes.
    pub async fn rollout_evidence(
        &self,
        rollout: Position,
    ) -> Result<BTreeMap<InstanceId, Witnessed>, StoreError> {
        const READ: &str = "select instance, applied, error, connections, refused, failed \
             from weft.rollout_evidence where rollout = $1";
        let rows = sqlx::query(READ).bind(rollout.0.cast_signed()).fetch_all(&self.pool).await;
        let rows = rows.map_err(failed("read what canaries said"))?;
        let row = |row: sqlx::postgres::PgRow| {
            let name: String = row.get(0);
            let Ok(instance) = name.parse() else {
                return Err(StoreError::Row { table: "weft.rollout_evidence", key: name });
            };
            let number = |column: usize| u64::try_from(row.get::<i64, _>(column)).unwrap_or_default();
            let evidence = Evidence { connections: number(3), refused: number(4), failed: number(5) };
            Ok((instance, Witnessed { applied: row.get(1), error: row.get(2), evidence }))
        };
        rows.into_iter().map(row).collect()
    }
}
