//! Writing rows: per table one statement for all rows that change and one for all that go.

use sqlx::PgConnection;

use crate::rows::{
    ClassRow, FlappingRow, InstanceRow, ManifestRow, PolicyRow, RowChanges, ServiceRow, ShardRow, SidecarRow,
    Table, Writer,
};

/// Manifests whose time is remembered per class. A sidecar that is further behind shows the lag since the oldest.
const HISTORY_MAX: i64 = 64;

/// Parts of changed rows, one vector per column.
fn split<R>(table: &Table<R>) -> (Vec<&str>, Vec<&R>, Vec<&str>) {
    let (mut keys, mut rows, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    for (key, row) in table {
        match row {
            Some(row) => {
                keys.push(key.as_str());
                rows.push(row);
            }
            None => gone.push(key.as_str()),
        }
    }
    (keys, rows, gone)
}

fn column<R, T>(rows: &[&R], of: impl Fn(&R) -> T) -> Vec<T> {
    rows.iter().map(|row| of(row)).collect()
}

fn writers<R>(rows: &[&R], of: impl Fn(&R) -> &Writer) -> (Vec<i64>, Vec<i64>, Vec<i64>, Vec<String>) {
    (
        column(rows, |row| of(row).version),
        column(rows, |row| of(row).position),
        column(rows, |row| of(row).changed_at_ms),
        column(rows, |row| of(row).actor.clone()),
    )
}

pub(super) async fn rows(connection: &mut PgConnection, changes: &RowChanges) -> Result<(), sqlx::Error> {
    shards(connection, &changes.shards).await?;
    classes(connection, &changes.classes).await?;
    manifests(connection, &changes.manifests).await?;
    sidecars(connection, &changes.sidecars).await?;
    services(connection, &changes.services).await?;
    instances(connection, &changes.instances).await?;
    flapping(connection, &changes.flapping).await?;
    policies(connection, &changes.policies).await
}

async fn remove(connection: &mut PgConnection, sql: &'static str, keys: &[&str]) -> Result<(), sqlx::Error> {
    if keys.is_empty() {
        return Ok(());
    }
    sqlx::query(sql).bind(keys).execute(connection).await.map(|_| ())
}

async fn shards(connection: &mut PgConnection, table: &Table<ShardRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.proxy_routing_state (shard_key, position, hash, body) \
         select * from unnest($1::text[], $2::bigint[], $3::bytea[], $4::bytea[]) \
         on conflict (shard_key) do update set position = excluded.position, hash = excluded.hash, body = excluded.body";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.proxy_routing_state where shard_key = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let bodies: Vec<&[u8]> = rows.iter().map(|row| row.body.as_ref()).collect();
    let hashes: Vec<&[u8]> = rows.iter().map(|row| row.hash.0.as_slice()).collect();
    let put = sqlx::query(PUT).bind(keys).bind(column(&rows, |row| row.position)).bind(hashes).bind(bodies);
    put.execute(connection).await.map(|_| ())
}

async fn classes(connection: &mut PgConnection, table: &Table<ClassRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.interest_class (class_id, service, upstreams, canary) \
         select * from unnest($1::text[], $2::text[], $3::text[], $4::boolean[]) \
         on conflict (class_id) do update set service = excluded.service, upstreams = excluded.upstreams, \
         canary = excluded.canary";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.interest_class where class_id = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let services = column(&rows, |row| row.service.clone());
    let upstreams = column(&rows, |row| row.upstreams.clone());
    let canary = column(&rows, |row| row.canary);
    sqlx::query(PUT)
        .bind(keys)
        .bind(services)
        .bind(upstreams)
        .bind(canary)
        .execute(connection)
        .await
        .map(|_| ())
}

async fn manifests(connection: &mut PgConnection, table: &Table<ManifestRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.class_manifest as manifest (class_id, position, hash, produced_at) \
         select class_id, position, hash, clock_timestamp() \
         from unnest($1::text[], $2::bigint[], $3::bytea[]) as new (class_id, position, hash) \
         on conflict (class_id) do update set position = excluded.position, hash = excluded.hash, \
         produced_at = excluded.produced_at \
         where (manifest.position, manifest.hash) is distinct from (excluded.position, excluded.hash)";
    const HISTORY: &str = "insert into weft.manifest_history (class_id, position, produced_at) \
         select class_id, position, produced_at from weft.class_manifest where class_id = any($1) \
         on conflict do nothing";
    const PRUNE: &str = "delete from weft.manifest_history as history using ( \
         select class_id, (select position from weft.manifest_history as kept where kept.class_id = changed.class_id \
         order by position desc offset $2 limit 1) as oldest from unnest($1::text[]) as changed (class_id)) as bound \
         where history.class_id = bound.class_id and history.position <= bound.oldest";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.class_manifest where class_id = any($1)", &gone).await?;
    remove(connection, "delete from weft.manifest_history where class_id = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let hashes: Vec<&[u8]> = rows.iter().map(|row| row.hash.0.as_slice()).collect();
    let put = sqlx::query(PUT).bind(&keys).bind(column(&rows, |row| row.position)).bind(hashes);
    put.execute(&mut *connection).await?;
    sqlx::query(HISTORY).bind(&keys).execute(&mut *connection).await?;
    sqlx::query(PRUNE).bind(&keys).bind(HISTORY_MAX).execute(connection).await.map(|_| ())
}

async fn sidecars(connection: &mut PgConnection, table: &Table<SidecarRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.sidecar_class (instance, class_id, since, assigned_at) \
         select instance, class_id, since, clock_timestamp() \
         from unnest($1::text[], $2::text[], $3::bigint[]) as new (instance, class_id, since) \
         on conflict (instance) do update set class_id = excluded.class_id, since = excluded.since, \
         assigned_at = excluded.assigned_at";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.sidecar_class where instance = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let classes = column(&rows, |row| row.class_id.clone());
    let since = column(&rows, |row| row.since);
    sqlx::query(PUT).bind(keys).bind(classes).bind(since).execute(connection).await.map(|_| ())
}

async fn services(connection: &mut PgConnection, table: &Table<ServiceRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.projected_service \
         (name, address, ports, version, position, changed_at_ms, actor) \
         select name, address, ports::json, version, position, changed_at_ms, actor \
         from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[], $7::text[]) \
         as new (name, address, ports, version, position, changed_at_ms, actor) \
         on conflict (name) do update set address = excluded.address, ports = excluded.ports, \
         version = excluded.version, position = excluded.position, changed_at_ms = excluded.changed_at_ms, \
         actor = excluded.actor";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.projected_service where name = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let (versions, positions, times, actors) = writers(&rows, |row| &row.writer);
    let put = sqlx::query(PUT)
        .bind(keys)
        .bind(column(&rows, |row| row.address.clone()))
        .bind(column(&rows, |row| row.ports.clone()))
        .bind(versions)
        .bind(positions)
        .bind(times)
        .bind(actors);
    put.execute(connection).await.map(|_| ())
}

async fn instances(connection: &mut PgConnection, table: &Table<InstanceRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.projected_instance (instance, service, state, address, port, upstreams, \
         metadata, version, position, changed_at_ms, actor, health, health_revision, health_detail, health_at_ms, \
         leaf_serial, leaf_not_after_ms) \
         select instance, service, state, address, port, upstreams, metadata::json, version, position, \
         changed_at_ms, actor, health, health_revision, health_detail, health_at_ms, leaf_serial, leaf_not_after_ms \
         from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::int[], $6::text[], $7::text[], \
         $8::bigint[], $9::bigint[], $10::bigint[], $11::text[], $12::text[], $13::bigint[], $14::text[], \
         $15::bigint[], $16::text[], $17::bigint[]) as new (instance, service, state, address, port, upstreams, \
         metadata, version, position, changed_at_ms, actor, health, health_revision, health_detail, health_at_ms, \
         leaf_serial, leaf_not_after_ms) \
         on conflict (instance) do update set service = excluded.service, state = excluded.state, \
         address = excluded.address, port = excluded.port, upstreams = excluded.upstreams, \
         metadata = excluded.metadata, version = excluded.version, position = excluded.position, \
         changed_at_ms = excluded.changed_at_ms, actor = excluded.actor, health = excluded.health, \
         health_revision = excluded.health_revision, health_detail = excluded.health_detail, \
         health_at_ms = excluded.health_at_ms, leaf_serial = excluded.leaf_serial, \
         leaf_not_after_ms = excluded.leaf_not_after_ms";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.projected_instance where instance = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let (versions, positions, times, actors) = writers(&rows, |row| &row.writer);
    let put = sqlx::query(PUT)
        .bind(keys)
        .bind(column(&rows, |row| row.service.clone()))
        .bind(column(&rows, |row| row.state.clone()))
        .bind(column(&rows, |row| row.address.clone()))
        .bind(column(&rows, |row| row.port))
        .bind(column(&rows, |row| row.upstreams.clone()))
        .bind(column(&rows, |row| row.metadata.clone()))
        .bind(versions)
        .bind(positions)
        .bind(times)
        .bind(actors)
        .bind(column(&rows, |row| row.health.clone()))
        .bind(column(&rows, |row| row.health_revision))
        .bind(column(&rows, |row| row.health_detail.clone()))
        .bind(column(&rows, |row| row.health_at_ms))
        .bind(column(&rows, |row| row.leaf_serial.clone()))
        .bind(column(&rows, |row| row.leaf_not_after_ms));
    put.execute(connection).await.map(|_| ())
}

async fn flapping(connection: &mut PgConnection, table: &Table<FlappingRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.projected_flapping (instance, penalty_milli, charged_at_ms, reported, \
         reported_since_ms, held_since_ms, held_by, hidden) \
         select * from unnest($1::text[], $2::bigint[], $3::bigint[], $4::text[], $5::bigint[], $6::bigint[], \
         $7::bigint[], $8::bigint[]) \
         on conflict (instance) do update set penalty_milli = excluded.penalty_milli, \
         charged_at_ms = excluded.charged_at_ms, reported = excluded.reported, \
         reported_since_ms = excluded.reported_since_ms, held_since_ms = excluded.held_since_ms, \
         held_by = excluded.held_by, hidden = excluded.hidden";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.projected_flapping where instance = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let put = sqlx::query(PUT)
        .bind(keys)
        .bind(column(&rows, |row| row.penalty_milli))
        .bind(column(&rows, |row| row.charged_at_ms))
        .bind(column(&rows, |row| row.reported.clone()))
        .bind(column(&rows, |row| row.reported_since_ms))
        .bind(column(&rows, |row| row.held_since_ms))
        .bind(column(&rows, |row| row.held_by))
        .bind(column(&rows, |row| row.hidden));
    put.execute(connection).await.map(|_| ())
}

async fn policies(connection: &mut PgConnection, table: &Table<PolicyRow>) -> Result<(), sqlx::Error> {
    const PUT: &str = "insert into weft.projected_policy \
         (scope, kind, version, position, changed_at_ms, actor, spec, summary) \
         select scope, kind, version, position, changed_at_ms, actor, spec::json, summary \
         from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], \
         $8::text[]) as new (scope, kind, version, position, changed_at_ms, actor, spec, summary) \
         on conflict (scope) do update set kind = excluded.kind, version = excluded.version, \
         position = excluded.position, changed_at_ms = excluded.changed_at_ms, actor = excluded.actor, \
         spec = excluded.spec, summary = excluded.summary";
    let (keys, rows, gone) = split(table);
    remove(connection, "delete from weft.projected_policy where scope = any($1)", &gone).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let (versions, positions, times, actors) = writers(&rows, |row| &row.writer);
    let put = sqlx::query(PUT)
        .bind(keys)
        .bind(column(&rows, |row| row.kind.clone()))
        .bind(versions)
        .bind(positions)
        .bind(times)
        .bind(actors)
        .bind(column(&rows, |row| row.spec.clone()))
        .bind(column(&rows, |row| row.summary.clone()));
    put.execute(connection).await.map(|_| ())
}
