//! Reading all rows back, as they would be computed.

use futures_util::TryStreamExt;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use std::sync::Arc;
use weft_model::ConfigVersion;
use weft_routing::Hash;

use super::{PROJECTION, StoreError, failed, version};
use crate::rows::{
    ClassRow, FlappingRow, InstanceRow, ManifestRow, PolicyRow, RowChanges, ServiceRow, ShardRow, SidecarRow,
    Table, Writer,
};

const DOING: &str = "read the projection";

/// Every row, with the checkpoint. The connection must be at the start of a transaction.
pub(super) async fn all(connection: &mut PgConnection) -> Result<(ConfigVersion, RowChanges), StoreError> {
    let snapshot = sqlx::query("set transaction isolation level repeatable read, read only");
    snapshot.execute(&mut *connection).await.map_err(failed(DOING))?;
    let checkpoint =
        sqlx::query("select epoch, position from weft.projection where name = $1").bind(PROJECTION);
    let checkpoint = checkpoint.fetch_optional(&mut *connection).await.map_err(failed(DOING))?;
    let checkpoint = checkpoint.map(|row| version(row.get(0), row.get(1))).unwrap_or_default();
    let rows = RowChanges {
        shards: table(
            connection,
            "select shard_key, position, hash, body from weft.proxy_routing_state",
            "weft.proxy_routing_state",
            shard,
        )
        .await?,
        classes: table(
            connection,
            "select class_id, service, upstreams, canary from weft.interest_class",
            "weft.interest_class",
            |row| Some(ClassRow { service: row.get(1), upstreams: row.get(2), canary: row.get(3) }),
        )
        .await?,
        manifests: table(
            connection,
            "select class_id, position, hash from weft.class_manifest",
            "weft.class_manifest",
            |row| Some(ManifestRow { position: row.get(1), hash: Hash::from_slice(row.get(2))? }),
        )
        .await?,
        sidecars: table(
            connection,
            "select instance, class_id, since from weft.sidecar_class",
            "weft.sidecar_class",
            |row| Some(SidecarRow { class_id: row.get(1), since: row.get(2) }),
        )
        .await?,
        services: table(
            connection,
            "select name, version, position, changed_at_ms, actor, address, ports::text from weft.projected_service",
            "weft.projected_service",
            |row| Some(ServiceRow { address: row.get(5), ports: row.get(6), writer: writer(row) }),
        )
        .await?,
        instances: table(
            connection,
            "select instance, version, position, changed_at_ms, actor, service, state, address, port, upstreams, \
             metadata::text, health, health_revision, health_detail, health_at_ms, leaf_serial, leaf_not_after_ms \
             from weft.projected_instance",
            "weft.projected_instance",
            |row| Some(instance(row)),
        )
        .await?,
        flapping: table(
            connection,
            "select instance, penalty_milli, charged_at_ms, reported, reported_since_ms, held_since_ms, held_by, hidden \
             from weft.projected_flapping",
            "weft.projected_flapping",
            |row| {
                Some(FlappingRow {
                    penalty_milli: row.get(1),
                    charged_at_ms: row.get(2),
                    reported: row.get(3),
                    reported_since_ms: row.get(4),
                    held_since_ms: row.get(5),
                    held_by: row.get(6),
                    hidden: row.get(7),
                })
            },
        )
        .await?,
        policies: table(
            connection,
            "select scope, version, position, changed_at_ms, actor, kind, spec::text, summary \
             from weft.projected_policy",
            "weft.projected_policy",
            |row| {
                let (kind, spec, summary) = (row.get(5), row.get(6), row.get(7));
                Some(PolicyRow { kind, writer: writer(row), spec, summary })
            },
        )
        .await?,
    };
    Ok((checkpoint, rows))
}

async fn table<R>(
    connection: &mut PgConnection,
    sql: &'static str,
    name: &'static str,
    decode: impl Fn(&PgRow) -> Option<R>,
) -> Result<Table<R>, StoreError> {
    let mut rows = sqlx::query(sql).fetch(connection);
    let mut table = Table::new();
    while let Some(row) = rows.try_next().await.map_err(failed(DOING))? {
        let key: String = row.get(0);
        let Some(decoded) = decode(&row) else { return Err(StoreError::Row { table: name, key }) };
        table.insert(key, Some(decoded));
    }
    Ok(table)
}

/// Columns 1 to 4 of the queries above.
fn writer(row: &PgRow) -> Writer {
    Writer { version: row.get(1), position: row.get(2), changed_at_ms: row.get(3), actor: row.get(4) }
}

fn shard(row: &PgRow) -> Option<ShardRow> {
    let (hash, body): (&[u8], &[u8]) = (row.get(2), row.get(3));
    Some(ShardRow { position: row.get(1), hash: Hash::from_slice(hash)?, body: Arc::from(body) })
}

fn instance(row: &PgRow) -> InstanceRow {
    InstanceRow {
        service: row.get(5),
        state: row.get(6),
        address: row.get(7),
        port: row.get(8),
        upstreams: row.get(9),
        metadata: row.get(10),
        writer: writer(row),
        health: row.get(11),
        health_revision: row.get(12),
        health_detail: row.get(13),
        health_at_ms: row.get(14),
        leaf_serial: row.get(15),
        leaf_not_after_ms: row.get(16),
    }
}
