//! The `token` scope: one join token, created for a service, redeemed at most once.

use crate::event::event_family;
use crate::id::{InstanceId, Name, ServiceName};
use crate::rejection::Rejection;
use crate::time::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Longest life of a join token: a rollout that takes longer than a day makes new ones.
pub const LIFETIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);

event_family! {
    /// What can happen in a `token` scope.
    TokenEvent { JoinTokenCreated = 1, JoinTokenRedeemed = 1 }
}

/// Whoever holds the secret may join once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenCreated {
    /// SHA-256 of the secret, in hex. The secret itself is never stored.
    pub secret_sha256: String,
    /// The service whose instance the holder becomes.
    pub service: ServiceName,
    /// The only instance it may become, if that was said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Name>,
    /// When it stops being valid.
    pub expires_at: Timestamp,
}

/// The token was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenRedeemed {
    /// Who joined with it.
    pub instance: InstanceId,
}

/// What someone wants of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenCommand {
    /// Create it.
    Create(JoinTokenCreated),
    /// Join with it.
    Redeem {
        /// SHA-256 of the secret that the caller showed, in hex.
        secret_sha256: String,
        /// Who the caller wants to become.
        instance: InstanceId,
    },
}

/// A token's life so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenState {
    /// Nobody created it.
    #[default]
    Absent,
    /// It waits to be used.
    Created(JoinTokenCreated),
    /// It was used.
    Redeemed(JoinTokenCreated, JoinTokenRedeemed),
}

/// Decides a command.
///
/// # Errors
/// If the token cannot be created, or not be redeemed by this caller now.
pub fn decide(
    state: &TokenState,
    command: &TokenCommand,
    now: Timestamp,
) -> Result<Vec<TokenEvent>, Rejection> {
    match (command, state) {
        (TokenCommand::Create(token), TokenState::Absent) => {
            if token.expires_at <= now || token.expires_at > now.after(LIFETIME_MAX) {
                return Err(Rejection::invalid("expires_at", "must lie in the next 24 hours"));
            }
            if token.secret_sha256.len() != 64 || !token.secret_sha256.bytes().all(|b| b.is_ascii_hexdigit())
            {
                return Err(Rejection::invalid("secret_sha256", "64 hex digits"));
            }
            Ok(vec![token.clone().into()])
        }
        // Ids are random: one that exists already was guessed or replayed.
        (TokenCommand::Create(_), TokenState::Created(_) | TokenState::Redeemed(..)) => {
            Err(Rejection::invalid("token", "exists already"))
        }
        (TokenCommand::Redeem { .. }, TokenState::Absent) => Err(Rejection::TokenUnknown),
        (TokenCommand::Redeem { secret_sha256, instance }, TokenState::Created(token)) => {
            admit(token, secret_sha256, instance, now)?;
            Ok(vec![JoinTokenRedeemed { instance: instance.clone() }.into()])
        }
        (TokenCommand::Redeem { secret_sha256, .. }, TokenState::Redeemed(token, redeemed)) => {
            if *secret_sha256 == token.secret_sha256 {
                Err(Rejection::TokenUsed { by: redeemed.instance.clone() })
            } else {
                Err(Rejection::TokenUnknown)
            }
        }
    }
}

/// The state after an event.
#[must_use]
pub fn apply(state: TokenState, event: &TokenEvent) -> TokenState {
    match (event, state) {
        (TokenEvent::JoinTokenCreated(token), _) => TokenState::Created(token.clone()),
        (TokenEvent::JoinTokenRedeemed(_), TokenState::Absent) => TokenState::Absent,
        (
            TokenEvent::JoinTokenRedeemed(redeemed),
            TokenState::Created(token) | TokenState::Redeemed(token, _),
        ) => TokenState::Redeemed(token, redeemed.clone()),
    }
}

/// Hashes of secrets of at least 128 random bits are compared: their timing tells nothing about a secret.
fn admit(
    token: &JoinTokenCreated,
    secret_sha256: &str,
    wanted: &InstanceId,
    now: Timestamp,
) -> Result<(), Rejection> {
    if token.secret_sha256 != secret_sha256 {
        return Err(Rejection::TokenUnknown);
    }
    if token.expires_at <= now {
        return Err(Rejection::TokenExpired { at: token.expires_at });
    }
    let elsewhere = token.service != wanted.service
        || token.instance.as_ref().is_some_and(|instance| *instance != wanted.instance);
    if elsewhere { Err(Rejection::TokenElsewhere { wanted: wanted.clone() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000);

    fn created() -> JoinTokenCreated {
        JoinTokenCreated {
            secret_sha256: digest("aa"),
            service: "default/api".parse().unwrap(),
            instance: None,
            expires_at: Timestamp(2_000),
        }
    }

    fn digest(secret: &str) -> String {
        secret.repeat(32)
    }

    fn redeem(secret: &str, instance: &str) -> TokenCommand {
        TokenCommand::Redeem { secret_sha256: digest(secret), instance: instance.parse().unwrap() }
    }

    #[test]
    fn a_token_is_used_once_by_whom_it_was_made_for() {
        let state = TokenState::Created(created());
        let join = redeem("aa", "default/api/api-1");
        let events = decide(&state, &join, NOW).unwrap();
        let used = events.iter().fold(state.clone(), apply);
        assert!(matches!(decide(&used, &join, NOW), Err(Rejection::TokenUsed { .. })));
        assert_eq!(
            decide(&used, &redeem("bb", "default/api/api-1"), NOW),
            Err(Rejection::TokenUnknown),
            "who does not know the secret does not learn who used it"
        );
        assert!(matches!(
            decide(&state, &redeem("aa", "default/db/db-1"), NOW),
            Err(Rejection::TokenElsewhere { .. })
        ));
        let bound = JoinTokenCreated { instance: Some("api-2".parse().unwrap()), ..created() };
        assert!(matches!(
            decide(&TokenState::Created(bound), &join, NOW),
            Err(Rejection::TokenElsewhere { .. })
        ));
    }

    #[test]
    fn a_token_needs_its_secret_and_its_time() {
        let state = TokenState::Created(created());
        let join = redeem("aa", "default/api/api-1");
        assert_eq!(decide(&state, &redeem("bb", "default/api/api-1"), NOW), Err(Rejection::TokenUnknown));
        assert_eq!(decide(&TokenState::Absent, &join, NOW), Err(Rejection::TokenUnknown));
        let late = Timestamp(2_000);
        assert_eq!(decide(&state, &join, late), Err(Rejection::TokenExpired { at: late }));
        assert!(decide(&TokenState::Absent, &TokenCommand::Create(created()), NOW).is_ok());
        assert!(decide(&TokenState::Absent, &TokenCommand::Create(created()), late).is_err());
        let for_ever = JoinTokenCreated { expires_at: Timestamp(i64::MAX), ..created() };
        let no_digest = JoinTokenCreated { secret_sha256: "aa".into(), ..created() };
        for bad in [for_ever, no_digest] {
            assert!(decide(&TokenState::Absent, &TokenCommand::Create(bad), NOW).is_err());
        }
        assert!(decide(&state, &TokenCommand::Create(created()), NOW).is_err());
    }
}
