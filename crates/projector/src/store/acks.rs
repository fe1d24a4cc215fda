//! What sidecars said, and what follows from it for people.
//!
//! A sidecar that runs what its class runs has no row of its own to be kept up to date: the class has one, per controller.

use sqlx::{PgConnection, Row};
use uuid::Uuid;
use weft_model::{ConfigVersion, InstanceId};
use weft_routing::{ClassId, Hash};

use super::{Store, StoreError, failed, version};

/// Rows in one statement.
const ROWS_MAX: usize = 1_000;

/// The controller that writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serving {
    /// Tells it from another process of that name.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Sidecars that are subscribed to it.
    pub sidecars: usize,
    /// How late what its sidecars say is written at most, in milliseconds.
    pub known_within_ms: u64,
}

/// What a sidecar last said to this controller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Whether it is subscribed here.
    pub connected: bool,
    /// What it runs; none if nothing.
    pub applied: Option<(ConfigVersion, Hash)>,
    /// How long its last swap took, in milliseconds.
    pub took_ms: Option<u32>,
    /// Why it refused its newest snapshot.
    pub error: Option<String>,
    /// The class that tells the rest: it runs what [`ClassAck`] says, or what stands here, whichever is newer.
    pub class: Option<ClassId>,
}

/// What every sidecar runs at least that is subscribed here and goes with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClassAck {
    /// The class.
    pub class: ClassId,
    /// What they run.
    pub applied: ConfigVersion,
    /// The longest of their last swaps, in milliseconds.
    pub took_ms: Option<u32>,
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
    /// Whether that is longer than the mesh's propagation bound allows.
    pub outside_bound: bool,
    /// Whether it is subscribed to a controller.
    pub connected: bool,
    /// When it was last heard of, in milliseconds since the Unix epoch; 0 if never.
    pub last_seen_ms: i64,
    /// Why it refused its newest snapshot; empty if it did not.
    pub error: String,
}

impl Store {
    /// Writes what sidecars said to a controller, in one transaction. A sidecar that went away is only marked as gone if it
    /// did not turn up at another controller since.
    ///
    /// # Errors
    /// If the database fails; nothing is written then.
    pub async fn put_acks(
        &self,
        serving: &Serving,
        sidecars: &[(InstanceId, Ack)],
        classes: &[ClassAck],
    ) -> Result<(), StoreError> {
        let failed = failed("record acknowledgements");
        let mut transaction = self.pool.begin().await.map_err(&failed)?;
        put_serving(&mut transaction, serving).await.map_err(&failed)?;
        for rows in sidecars.chunks(ROWS_MAX) {
            put_sidecars(&mut transaction, serving, rows).await.map_err(&failed)?;
        }
        for rows in classes.chunks(ROWS_MAX) {
            put_classes(&mut transaction, serving, rows).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)
    }

    /// Forgets what was said by sidecars that do not take part any more and were not heard of for a day, and controllers that
    /// were not. Those who left a moment ago may be about to come back.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn forget_acks(&self) -> Result<(), StoreError> {
        const SIDECARS: &str = "delete from weft.sidecar_ack as ack \
             where seen_at < clock_timestamp() - interval '1 day' \
             and not exists (select from weft.sidecar_class where instance = ack.instance) \
             and not exists (select from weft.controller where controller_id = ack.controller_id and ack.connected \
             and seen_at > clock_timestamp() - interval '1 day')";
        const CONTROLLERS: &str = "delete from weft.controller where seen_at < clock_timestamp() - interval '1 day' \
             and not exists (select from weft.sidecar_ack as ack where ack.controller_id = controller.controller_id)";
        const CLASSES: &str = "delete from weft.class_ack as class \
             where not exists (select from weft.interest_class where class_id = class.class_id) \
             and seen_at < clock_timestamp() - interval '1 day'";
        for sql in [SIDECARS, CONTROLLERS, CLASSES] {
            let forgotten = sqlx::query(sql).execute(&self.pool).await;
            forgotten.map_err(failed("forget acknowledgements"))?;
        }
        Ok(())
    }

    /// Every sidecar that takes part, as of the checkpoint; the same answer as `status.sidecars`.
    ///
    /// # Errors
    /// If the database fails, or a row is not one that a projector writes.
    pub async fn sidecars(&self) -> Result<Vec<SidecarStatus>, StoreError> {
        const SQL: &str = "select instance, wanted_epoch, wanted_position, applied_epoch, applied_position, \
             lag_ms::bigint, coalesce(outside_bound, false), coalesce(connected, false), \
             coalesce((extract(epoch from seen_at) * 1000)::bigint, 0), coalesce(error, '') \
             from weft.sidecar_state order by instance";
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
                outside_bound: row.get(6),
                connected: row.get(7),
                last_seen_ms: row.get(8),
                error: row.get(9),
            })
        };
        rows.iter().map(decode).collect()
    }

    /// How many sidecars are outside the propagation bound; as many as `status.stale` lists.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn sidecars_outside_bound(&self) -> Result<u64, StoreError> {
        const SQL: &str = "select count(*) from weft.sidecar_state where outside_bound";
        let count = sqlx::query_scalar::<_, i64>(SQL).fetch_one(&self.pool).await;
        count.map(i64::cast_unsigned).map_err(failed("count the sidecars outside the propagation bound"))
    }
}

async fn put_serving(connection: &mut PgConnection, serving: &Serving) -> Result<(), sqlx::Error> {
    const SQL: &str = "insert into weft.controller (controller_id, name, sidecars, known_within_ms, seen_at) \
         values ($1, $2, $3, $4, clock_timestamp()) \
         on conflict (controller_id) do update set name = excluded.name, sidecars = excluded.sidecars, \
         known_within_ms = excluded.known_within_ms, seen_at = excluded.seen_at";
    let put = sqlx::query(SQL)
        .bind(serving.id)
        .bind(&serving.name)
        .bind(i64::try_from(serving.sidecars).unwrap_or(i64::MAX))
        .bind(serving.known_within_ms.cast_signed());
    put.execute(connection).await.map(|_| ())
}

async fn put_sidecars(
    connection: &mut PgConnection,
    serving: &Serving,
    acks: &[(InstanceId, Ack)],
) -> Result<(), sqlx::Error> {
    const SQL: &str = "insert into weft.sidecar_ack as ack (instance, controller, controller_id, connected, \
         epoch, position, manifest_hash, took_ms, error, class_id, seen_at) \
         select instance, $1, $2, connected, epoch, position, manifest_hash, took_ms, error, class_id, clock_timestamp() \
         from unnest($3::text[], $4::boolean[], $5::bigint[], $6::bigint[], $7::bytea[], $8::bigint[], \
         $9::text[], $10::text[]) as new (instance, connected, epoch, position, manifest_hash, took_ms, error, class_id) \
         on conflict (instance) do update set controller = excluded.controller, \
         controller_id = excluded.controller_id, connected = excluded.connected, epoch = excluded.epoch, \
         position = excluded.position, manifest_hash = excluded.manifest_hash, \
         took_ms = coalesce(excluded.took_ms, ack.took_ms), error = excluded.error, class_id = excluded.class_id, \
         seen_at = excluded.seen_at \
         where excluded.connected or ack.controller_id = excluded.controller_id";
    let instances: Vec<_> = acks.iter().map(|(instance, _)| instance.to_string()).collect();
    let connected: Vec<_> = acks.iter().map(|(_, ack)| ack.connected).collect();
    let applied = || acks.iter().map(|(_, ack)| ack.applied.as_ref());
    let epochs: Vec<_> = applied().map(|have| have.map(|have| have.0.epoch.0.cast_signed())).collect();
    let positions: Vec<_> = applied().map(|have| have.map(|have| have.0.position.0.cast_signed())).collect();
    let hashes: Vec<_> = applied().map(|have| have.map(|have| have.1.0.to_vec())).collect();
    let took: Vec<_> = acks.iter().map(|(_, ack)| ack.took_ms.map(i64::from)).collect();
    let errors: Vec<_> = acks.iter().map(|(_, ack)| ack.error.clone()).collect();
    let classes: Vec<_> = acks.iter().map(|(_, ack)| ack.class.map(|class| class.to_string())).collect();
    let put = sqlx::query(SQL)
        .bind(&serving.name)
        .bind(serving.id)
        .bind(instances)
        .bind(connected)
        .bind(epochs)
        .bind(positions)
        .bind(hashes)
        .bind(took)
        .bind(errors)
        .bind(classes);
    put.execute(connection).await.map(|_| ())
}

async fn put_classes(
    connection: &mut PgConnection,
    serving: &Serving,
    acks: &[ClassAck],
) -> Result<(), sqlx::Error> {
    const SQL: &str = "insert into weft.class_ack (controller_id, class_id, epoch, position, took_ms, seen_at) \
         select $1, class_id, epoch, position, took_ms, clock_timestamp() \
         from unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[]) as new (class_id, epoch, position, took_ms) \
         on conflict (controller_id, class_id) do update set epoch = excluded.epoch, position = excluded.position, \
         took_ms = excluded.took_ms, seen_at = excluded.seen_at";
    let put = sqlx::query(SQL)
        .bind(serving.id)
        .bind(acks.iter().map(|ack| ack.class.to_string()).collect::<Vec<_>>())
        .bind(acks.iter().map(|ack| ack.applied.epoch.0.cast_signed()).collect::<Vec<_>>())
        .bind(acks.iter().map(|ack| ack.applied.position.0.cast_signed()).collect::<Vec<_>>())
        .bind(acks.iter().map(|ack| ack.took_ms.map(i64::from)).collect::<Vec<_>>());
    put.execute(connection).await.map(|_| ())
}
