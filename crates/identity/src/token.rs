//! Join tokens: how somebody without a certificate gets the first one.
//!
//! A token is shown once, to whoever creates it, and works once. It says which token it is, proves that its holder was
//! given it, and names the root that the controller must present, so that a joiner never sends the secret to anybody
//! else. The controller keeps the id and the hash of the secret; what the token is good for, when it expires and that
//! it was used are events in the log.

use crate::fingerprint::{Fingerprint, decode_hex, sha256};
use aws_lc_rs::rand;
use std::fmt;
use std::str::FromStr;
use weft_model::TokenId;
use zeroize::Zeroizing;

/// What every token starts with: the program and the version of the form.
const PREFIX: &str = "weft1";

/// Random bytes in a token's id, as many as a [`TokenId`] has: ids do not repeat, and guessing one gains nothing.
const ID_BYTES: usize = 16;

/// Bytes of the secret: 256 bits, so that guessing is hopeless even without a limit on the rate.
const SECRET_BYTES: usize = 32;

/// Longest text that is looked at, in bytes. A token has 168; white space around a pasted one is forgiven.
const TEXT_BYTES_MAX: usize = 256;

const NEXT_STEP: &str = "copy the whole line that `weft token create` printed";

/// A text is not a join token. The text itself is not in the message: it may be a secret with a typing error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not start with `weft1.`, or is far too long.
    #[error("this is not a Weft join token, which starts with `{PREFIX}.`; {NEXT_STEP}")]
    NotAToken,
    /// It has not four parts.
    #[error("the join token is incomplete; {NEXT_STEP}")]
    Incomplete,
    /// Its id has not 32 hexadecimal digits.
    #[error("the id in the join token is malformed; {NEXT_STEP}")]
    Id,
    /// Its secret has not 64 hexadecimal digits.
    #[error("the secret in the join token is malformed; {NEXT_STEP}")]
    Secret,
    /// Its root fingerprint has not 64 hexadecimal digits.
    #[error("the root fingerprint in the join token is malformed; {NEXT_STEP}")]
    Root,
}

/// No token can be made: the system has no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no randomness for a join token")]
pub struct RandomnessError;

/// A join token, with its secret. Neither `Debug` nor any other implicit text shows the secret.
#[derive(Clone)]
pub struct JoinToken {
    id: TokenId,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
    root: Fingerprint,
}

impl JoinToken {
    /// Makes a token for the mesh with this root.
    ///
    /// # Errors
    ///
    /// The system has no randomness.
    pub fn generate(root: Fingerprint) -> Result<Self, RandomnessError> {
        let mut id = [0; ID_BYTES];
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        rand::fill(&mut id).map_err(|_| RandomnessError)?;
        rand::fill(secret.as_mut()).map_err(|_| RandomnessError)?;
        let id = hex::encode(id).parse().map_err(|_| RandomnessError)?;
        Ok(Self { id, secret, root })
    }

    /// Which token it is. Not a secret: logs and lists show it.
    #[must_use]
    pub const fn id(&self) -> &TokenId {
        &self.id
    }

    /// The root that the controller must present before the token may be sent to it.
    #[must_use]
    pub const fn root(&self) -> Fingerprint {
        self.root
    }

    /// What the controller keeps of the secret: its SHA-256, in hex. Who reads that cannot join with it.
    #[must_use]
    pub fn secret_sha256(&self) -> String {
        hex::encode(sha256(self.secret.as_ref()))
    }

    /// The whole token as text, secret included, for the one who joins: `weft1.<id>.<secret>.<root>`.
    #[must_use]
    pub fn reveal(&self) -> Zeroizing<String> {
        let secret = Zeroizing::new(hex::encode(self.secret.as_ref()));
        Zeroizing::new(format!("{PREFIX}.{}.{}.{}", self.id, *secret, self.root))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(s: &str) -> Result<Self, TokenError> {
        if s.len() > TEXT_BYTES_MAX {
            return Err(TokenError::NotAToken);
        }
        let mut parts = s.trim().split('.');
        if parts.next() != Some(PREFIX) {
            return Err(TokenError::NotAToken);
        }
        let (Some(id), Some(secret), Some(root), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(TokenError::Incomplete);
        };
        Ok(Self {
            id: id.parse().map_err(|_| TokenError::Id)?,
            secret: Zeroizing::new(decode_hex(secret).ok_or(TokenError::Secret)?),
            root: root.parse().map_err(|_| TokenError::Root)?,
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, secret)", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> JoinToken {
        JoinToken::generate(Fingerprint::of_public_key(b"root")).unwrap()
    }

    #[test]
    fn a_token_survives_being_pasted() {
        let token = token();
        let read: JoinToken = format!(" {}\n", *token.reveal()).parse().unwrap();
        assert_eq!((read.id(), read.root()), (token.id(), token.root()));
        assert_eq!(token.secret_sha256(), read.secret_sha256());
    }

    #[test]
    fn every_token_is_another() {
        let (a, b) = (token(), token());
        assert_ne!(a.id(), b.id());
        assert_ne!(a.secret_sha256(), b.secret_sha256());
    }

    #[test]
    fn no_implicit_text_shows_the_secret() {
        let token = token();
        let secret = hex::encode(token.secret.as_ref());
        assert!(token.reveal().contains(&secret));
        assert!(!format!("{token:?} {token:#?}").contains(&secret));
        assert!(!token.secret_sha256().contains(&secret));
    }

    #[test]
    fn each_damage_has_its_own_message() {
        let good = token().reveal().to_string();
        let parts: Vec<&str> = good.split('.').collect();
        let with = |index: usize, part: &str| {
            let mut parts = parts.clone();
            parts[index] = part;
            parts.join(".")
        };
        for (text, error) in [
            (String::new(), TokenError::NotAToken),
            (with(0, "weft2"), TokenError::NotAToken),
            (good.repeat(2), TokenError::NotAToken),
            (parts[..3].join("."), TokenError::Incomplete),
            (format!("{good}.x"), TokenError::Incomplete),
            (with(1, ""), TokenError::Id),
            (with(1, "T1"), TokenError::Id),
            (with(2, &parts[2][1..]), TokenError::Secret),
            (with(2, &"A".repeat(64)), TokenError::Secret),
            (good[..good.len() - 1].to_owned(), TokenError::Root),
        ] {
            assert_eq!(text.parse::<JoinToken>().map(|_| ()), Err(error), "{text}");
            assert!(error.to_string().contains("weft token create"));
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(weft1\\.)?\\PC{0,300}|weft1(\\.[a-z0-9]{0,70}){0,5}") {
            if let Ok(token) = text.parse::<JoinToken>() {
                let shown = token.reveal();
                prop_assert_eq!(shown.as_str(), text.trim());
            }
        }
    }
}
