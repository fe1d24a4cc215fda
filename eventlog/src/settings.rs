//! Refuses a server that could lose acknowledged events or is too old.

use tokio_postgres::Client;

use crate::session::StoreError;

/// Oldest supported major version, as `server_version_num` writes it.
const SERVER_VERSION_MIN: i32 = 150_000;

/// The server must not hold the log as it is configured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// A setting allows acknowledged events to be lost in a crash.
    #[error(
        "PostgreSQL's {setting} is off, so a crash could lose events that were acknowledged; \
         run `{fix}`, or allow unsafe settings explicitly"
    )]
    Unsafe {
        /// Name of the setting.
        setting: &'static str,
        /// Statement that repairs it.
        fix: &'static str,
    },
    /// The server is older than the oldest supported version.
    #[error("PostgreSQL {found} is too old; the log needs version 15 or newer")]
    TooOld {
        /// The server's version.
        found: String,
    },
    /// The database can not hold every text.
    #[error("the database's encoding is {found}; create it with `encoding 'UTF8'`")]
    Encoding {
        /// The database's encoding.
        found: String,
    },
}

/// Settings that must not be `off`, each with the statement that repairs it.
const DURABLE: [(&str, &str); 3] = [
    ("fsync", "alter system set fsync = on; select pg_reload_conf()"),
    ("full_page_writes", "alter system set full_page_writes = on; select pg_reload_conf()"),
    ("synchronous_commit", "alter role current_user set synchronous_commit = on"),
];

/// What the server said about itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    version_num: i32,
    version: String,
    encoding: String,
    durable: [String; 3],
}

impl Settings {
    /// Reads the settings as they apply to this session.
    pub(crate) async fn read(client: &Client) -> Result<Self, StoreError> {
        const SQL: &str = "select current_setting('server_version_num')::int, current_setting('server_version'), \
                           current_setting('server_encoding'), current_setting('fsync'), \
                           current_setting('full_page_writes'), current_setting('synchronous_commit')";
        let row = client.query_one(SQL, &[]).await.map_err(StoreError::while_doing("read its settings"))?;
        Ok(Self {
            version_num: row.get(0),
            version: row.get(1),
            encoding: row.get(2),
            durable: [row.get(3), row.get(4), row.get(5)],
        })
    }

    /// Whether the log may live here. `allow_unsafe` waives durability, never the rest.
    pub(crate) fn check(&self, allow_unsafe: bool) -> Result<(), SettingsError> {
        if self.version_num < SERVER_VERSION_MIN {
            return Err(SettingsError::TooOld { found: self.version.clone() });
        }
        if self.encoding != "UTF8" {
            return Err(SettingsError::Encoding { found: self.encoding.clone() });
        }
        if let Err(refused) = check_durable(self.durable.each_ref().map(String::as_str)) {
            if !allow_unsafe {
                return Err(refused);
            }
            tracing::warn!(reason = %refused, "unsafe setting allowed");
        }
        Ok(())
    }
}

/// Whether a server with these values of [`DURABLE`], in its order, keeps what it acknowledges. Asked again with every
/// batch, because a server takes new values without a restart.
pub(crate) fn check_durable(values: [&str; 3]) -> Result<(), SettingsError> {
    match DURABLE.into_iter().zip(values).find(|(_, value)| *value == "off") {
        Some(((setting, fix), _)) => Err(SettingsError::Unsafe { setting, fix }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sound() -> Settings {
        Settings {
            version_num: 150_004,
            version: "15.4".into(),
            encoding: "UTF8".into(),
            durable: ["on".into(), "on".into(), "remote_apply".into()],
        }
    }

    #[test]
    fn each_way_to_lose_events_is_refused_by_name() {
        assert_eq!(sound().check(false), Ok(()));
        for (i, (name, _)) in DURABLE.into_iter().enumerate() {
            let mut settings = sound();
            settings.durable[i] = "off".into();
            let refused = settings.check(false);
            assert!(matches!(refused, Err(SettingsError::Unsafe { setting, .. }) if setting == name));
            assert_eq!(settings.check(true), Ok(()));
        }
    }

    #[test]
    fn age_and_encoding_are_refused_even_when_unsafe_settings_are_allowed() {
        let old = Settings { version_num: 140_010, version: "14.10".into(), ..sound() };
        assert_eq!(old.check(true), Err(SettingsError::TooOld { found: "14.10".into() }));
        let latin = Settings { encoding: "LATIN1".into(), ..sound() };
        assert_eq!(latin.check(true), Err(SettingsError::Encoding { found: "LATIN1".into() }));
    }
}
