//! Creates and upgrades the database's tables and views, for the whole of Weft.

use sqlx::PgPool;
use sqlx::migrate::{MigrateError as SqlxError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};
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

/// Applies every migration that the database lacks. Safe to call from several processes at once.
///
/// If the database is up to date it is only looked at: that takes no lock that somebody could hold, and no right that the
/// owner of the tables has and a controller needs not have.
///
/// # Errors
/// See [`MigrateError`]. Each migration is a transaction: a failed one leaves nothing behind.
pub async fn migrate(config: &Config) -> Result<(), MigrateError> {
    let pool = connect(config).await.map_err(MigrateError::Connect)?;
    if is_up_to_date(&pool).await {
        pool.close().await;
        return Ok(());
    }
    let result = MIGRATIONS.run(&pool).await.map_err(|error| match error {
        SqlxError::VersionMissing(version) => MigrateError::Newer { version },
        SqlxError::VersionMismatch(version) => MigrateError::Changed { version },
        other => MigrateError::Failed(other),
    });
    pool.close().await;
    result
}

/// Whether exactly our migrations were applied, as they are. If that cannot be seen, the migrator finds out why.
async fn is_up_to_date(pool: &PgPool) -> bool {
    const SQL: &str = "select version, checksum from public._sqlx_migrations where success order by version";
    let applied = sqlx::query_as::<_, (i64, Vec<u8>)>(SQL).fetch_all(pool).await.unwrap_or_default();
    let ours = MIGRATIONS.iter().map(|migration| (migration.version, migration.checksum.to_vec()));
    applied.into_iter().eq(ours)
}

/// Tries each configured host once and takes the first that accepts; the last error tells about the last host.
///
/// A pool of one, because the future that migrates a lone connection cannot be sent between threads.
async fn connect(config: &Config) -> Result<PgPool, sqlx::Error> {
    let mut result = Err(sqlx::Error::Configuration("the configuration names no host".into()));
    for options in candidates(config)? {
        result = PgPoolOptions::new().max_connections(1).connect_with(options).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Settings of the session, over those of the login. The table of applied migrations is named without a schema: a login
/// called "weft" would otherwise look for it in schema "weft" as soon as that exists, find none, and apply everything
/// again. The others are what would keep a migration from being done.
const SETTINGS: [(&str, &str); 4] = [
    ("search_path", "public"),
    ("default_transaction_read_only", "off"),
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
];

/// One set of options per host. Everything is said explicitly, because sqlx fills what is left out from the `PG…`
/// variables of whoever started us, and the log would be migrated elsewhere or otherwise than it is opened. Of
/// `PGOPTIONS`, which cannot be taken out, whatever is set here does not count.
fn candidates(config: &Config) -> Result<Vec<PgConnectOptions>, sqlx::Error> {
    let user = match config.get_user() {
        Some(user) => user.to_owned(),
        None => whoami::username().map_err(|error| sqlx::Error::Configuration(error.into()))?,
    };
    // A server that asks for a password refuses an empty one.
    let password = String::from_utf8_lossy(config.get_password().unwrap_or_default());
    let base = PgConnectOptions::new_without_pgpass()
        .username(&user)
        .password(&password)
        .database(config.get_dbname().unwrap_or(&user))
        .ssl_mode(PgSslMode::Disable)
        .application_name(config.get_application_name().unwrap_or("weft-migrate"))
        .options(given_settings(config.get_options().unwrap_or_default()))
        .options(SETTINGS);
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
    Ok(options.collect())
}

/// The settings in a configuration's `options`: `-c name=value` or `--name=value`, without blanks in values.
fn given_settings(options: &str) -> Vec<(String, String)> {
    let words = options.split_whitespace().filter(|word| *word != "-c");
    let settings = words.filter_map(|word| word.trim_start_matches("--").split_once('='));
    settings.map(|(name, value)| (name.trim_start_matches("-c").to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_configuration_leaves_out_is_not_left_to_the_environment() {
        let config: Config = "host=a,b port=1,2 user=u".parse().unwrap();
        let options = candidates(&config).unwrap();
        let found: Vec<_> = options.iter().map(|options| (options.get_host(), options.get_port())).collect();
        assert_eq!(found, [("a", 1), ("b", 2)]);
        assert_eq!((options[0].get_username(), options[0].get_database()), ("u", Some("u")));
        assert!(matches!(options[0].get_ssl_mode(), PgSslMode::Disable));
    }

    #[test]
    fn settings_given_with_the_address_are_kept_and_ours_come_last() {
        let config: Config =
            "host=a user=u options='-c role=owner --search_path=x -cwork_mem=8MB'".parse().unwrap();
        let options = candidates(&config).unwrap();
        let text = options[0].get_options().unwrap();
        let role = text.find("role=owner").unwrap();
        assert!(text.contains("work_mem=8MB") && role < text.rfind("search_path=public").unwrap(), "{text}");
        assert!(text.find("search_path=x") < text.find("search_path=public"), "{text}");
    }
}
