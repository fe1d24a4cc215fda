//! What sidecars said, and what follows from it for people.

use sqlx::Row;
use uuid::Uuid;
use weft_model::{ConfigVersion, InstanceId};
use weft_routing::Hash;

use super::{Store, StoreError, failed, version};

/// What a sidecar last said to this controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Whether it is subscribed here.
    pub connected: bool,
    /// What it runs; none if nothing.
    pub applied: Option<(ConfigVersion, Hash)>,
    /// How long its last swap took, in milliseconds.
    pub took_ms: Option<u32>,
    /// Why it refused its newest snapshot.
    pub error: Option<String>,
}

/// What a sidecar should run, what it runs, and since when it has been behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarStatus {
    /// The sidecar.
    pub instance: InstanceId,
    /// What it should run.
    pub wanted: ConfigVersion,
    /// What it said it runs.
    pub applied: Option<ConfigVersion>,
    /// How long it has been behind, in milliseconds; 0 if it is not.
    pub lag_ms: i64,
    /// Whether it is subscribed to a controller.
    pub connected: bool,
    /// When it was last heard of, in milliseconds since the Unix epoch; 0 if never.
    pub last_seen_ms: i64,
    /// Why it refused its newest snapshot; empty if it did not.
    pub error: String,
}

impl Store {
    /// Writes what sidecars said to `controller`; `id` tells it from another process of that name. A sidecar that went
    /// away is only marked as gone if it did not turn up at another controller since.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn put_acks(
        &self,
        controller: &str,
        id: Uuid,
        acks: &[(InstanceId, Ack)],
    ) -> Result<(), StoreError> {
        const SQL: &str = "insert into weft.sidecar_ack as ack (instance, controller, controller_id, connected, \
             epoch, position, manifest_hash, took_ms, error, seen_at) \
             select instance, $1, $2, connected, epoch, position, manifest_hash, took_ms, error, clock_timestamp() \
             from unnest($3::text[], $4::boolean[], $5::bigint[], $6::bigint[], $7::bytea[], $8::bigint[], \
             $9::text[]) as new (instance, connected, epoch, position, manifest_hash, took_ms, error) \
             on conflict (instance) do update set controller = excluded.controller, \
             controller_id = excluded.controller_id, connected = excluded.connected, epoch = excluded.epoch, position = excluded.position, \
             manifest_hash = excluded.manifest_hash, took_ms = coalesce(excluded.took_ms, ack.took_ms), \
             error = excluded.error, seen_at = excluded.seen_at \
             where excluded.connected or ack.controller_id = excluded.controller_id";
        if acks.is_empty() {
            return Ok(());
        }
        let instances: Vec<_> = acks.iter().map(|(instance, _)| instance.to_string()).collect();
        let connected: Vec<_> = acks.iter().map(|(_, ack)| ack.connected).collect();
        let applied = || acks.iter().map(|(_, ack)| ack.applied.as_ref());
        let epochs: Vec<_> = applied().map(|have| have.map(|have| have.0.epoch.0.cast_signed())).collect();
        let positions: Vec<_> =
            applied().map(|have| have.map(|have| have.0.position.0.cast_signed())).collect();
        let hashes: Vec<_> = applied().map(|have| have.map(|have| have.1.0.to_vec())).collect();
        let took: Vec<_> = acks.iter().map(|(_, ack)| ack.took_ms.map(i64::from)).collect();
        let errors: Vec<_> = acks.iter().map(|(_, ack)| ack.error.clone()).collect();
        let put = sqlx::query(SQL)
            .bind(controller)
            .bind(id)
            .bind(instances)
            .bind(connected)
            .bind(epochs)
            .bind(positions)
            .bind(hashes)
            .bind(took)
            .bind(errors);
        put.execute(&self.pool).await.map(|_| ()).map_err(failed("record acknowledgements"))
    }

    /// Says that these sidecars are still subscribed to the controller whose process has this id.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn refresh_acks(&self, id: Uuid, instances: &[InstanceId]) -> Result<(), StoreError> {
        const SQL: &str = "update weft.sidecar_ack set seen_at = clock_timestamp() \
                           where controller_id = $1 and connected and instance = any($2)";
        if instances.is_empty() {
            return Ok(());
        }
        let instances: Vec<_> = instances.iter().map(ToString::to_string).collect();
        let refreshed = sqlx::query(SQL).bind(id).bind(instances).execute(&self.pool).await;
        refreshed.map(|_| ()).map_err(failed("refresh acknowledgements"))
    }

    /// Forgets what was said by sidecars that do not take part any more and were not heard of for a day. Those who
    /// left a moment ago may be about to come back.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_acks(&self) -> Result<(), StoreError> {
        const SQL: &str = "delete from weft.sidecar_ack as ack \
                           where seen_at < clock_timestamp() - interval '1 day' \
                           and not exists (select from weft.sidecar_class where instance = ack.instance)";
        let forgotten = sqlx::query(SQL).execute(&self.pool).await;
        forgotten.map(|_| ()).map_err(failed("forget acknowledgements"))
    }

    /// Every sidecar that takes part, as of the checkpoint; the same answer as `status.sidecars`.
    ///
    /// # Errors
    /// If the database fails, or a row is not one that a projector writes.
    pub async fn sidecars(&self) -> Result<Vec<SidecarStatus>, StoreError> {
        const SQL: &str = "select status.instance, wanted.epoch, wanted.position, ack.epoch, ack.position, \
             (status.lag_seconds * 1000)::bigint, status.connected, \
             coalesce((extract(epoch from status.last_seen) * 1000)::bigint, 0), coalesce(status.error, '') \
             from status.sidecars as status \
             join weft.proxy_config_snapshot as wanted using (instance) \
             left join weft.sidecar_ack as ack using (instance) order by status.instance";
        let rows =
            sqlx::query(SQL).fetch_all(&self.pool).await.map_err(failed("read the sidecars' status"))?;
        let decode = |row: &sqlx::postgres::PgRow| {
            let name: String = row.get(0);
            let Ok(instance) = name.parse() else {
                return Err(StoreError::Row { table: "weft.sidecar_class", key: name });
            };
            let applied: Option<i64> = row.get(4);
            Ok(SidecarStatus {
                instance,
                wanted: version(row.get(1), row.get(2)),
                applied: applied
                    .map(|position| version(row.get::<Option<i64>, _>(3).unwrap_or_default(), position)),
                lag_ms: row.get(5),
                connected: row.get(6),
                last_seen_ms: row.get(7),
                error: row.get(8),
            })
        };
        rows.iter().map(decode).collect()
    }
}
