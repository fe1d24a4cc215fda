//! Creates and upgrades the database's tables and views, for the whole of Weft.

use sqlx::PgPool;
use sqlx::migrate::{MigrateError as SqlxError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

/// The database could not be brought up to date.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// The database can not be reached, or refuses the login.
    #[error("cannot connect to PostgreSQL to migrate its tables")]
    Connect(#[source] sqlx::Error),
    /// The database was written by a newer Weft.
    #[error("the database has migration {version}, which this version of weft does not know; upgrade weft")]
    Newer {
        /// The unknown migration.
        version: i64,
    },
    /// A migration that was applied is not the one of this name any more.
    #[error("migration {version} was changed after it was applied; use an unmodified build of weft")]
    Changed {
        /// The changed migration.
        version: i64,
    },
    /// A migration failed; the ones before it are applied, itself and later ones are not.
    #[error("cannot migrate the database")]
    Failed(#[source] SqlxError),
}

/// Applies every migration that the database lacks. Safe to call from several processes at once; does nothing if the
/// database is up to date.
///
/// # Errors
/// See [`MigrateError`]. Each migration is a transaction: a failed one leaves nothing behind.
pub async fn migrate(config: &Config) -> Result<(), MigrateError> {
    let pool = connect(config).await.map_err(MigrateError::Connect)?;
    let result = MIGRATIONS.run(&pool).await.map_err(|error| match error {
        SqlxError::VersionMissing(version) => MigrateError::Newer { version },
        SqlxError::VersionMismatch(version) => MigrateError::Changed { version },
        other => MigrateError::Failed(other),
    });
    pool.close().await;
    result
}

/// Tries each configured host once and takes the first that accepts; the last error tells about the last host.
///
/// A pool of one, because the future that migrates a lone connection cannot be sent between threads.
async fn connect(config: &Config) -> Result<PgPool, sqlx::Error> {
    let mut result = Err(sqlx::Error::Configuration("the configuration names no host".into()));
    for options in candidates(config) {
        result = PgPoolOptions::new().max_connections(1).connect_with(options).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

fn candidates(config: &Config) -> Vec<PgConnectOptions> {
    // The table of applied migrations is named without a schema. A login called "weft" would otherwise look for it in
    // schema "weft" as soon as that exists, find none, and apply everything again.
    let mut base = PgConnectOptions::new_without_pgpass().options([("search_path", "public")]);
    if let Some(user) = config.get_user() {
        base = base.username(user);
    }
    if let Some(password) = config.get_password() {
        base = base.password(&String::from_utf8_lossy(password));
    }
    if let Some(database) = config.get_dbname() {
        base = base.database(database);
    }
    let ports = config.get_ports();
    let hosts = config.get_hosts().iter().enumerate();
    let options = hosts.map(|(i, host)| {
        // As in libpq: one port for all hosts, one for each, or the default.
        let port = ports.get(i).or(ports.first()).copied().unwrap_or(5432);
        match host {
            Host::Tcp(name) => base.clone().host(name).port(port),
            Host::Unix(directory) => base.clone().socket(directory).port(port),
        }
    });
    options.collect()
}
