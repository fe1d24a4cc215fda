//! Records of TLS 1.3 (RFC 8446, section 5), sealed and opened where they lie: the bytes of an application are copied once
//! into a buffer by the kernel and once out of it, and never in between.
//!
//! The keys come from rustls, which makes the handshake ([`super::handshake`]) and derives the next ones. This is what it
//! does with records, without its buffers: an idle session holds two keys and two counters.
//!
//! Kept here: a nonce is never used twice (its counter only rises, and a session ends before it wraps); keys are replaced before they have
//! sealed so much that it weakens them; a record that does not authenticate ends the session, and nothing of it is seen.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use std::ops::Range;
use tokio_rustls::rustls::client::ClientConnectionData;
use tokio_rustls::rustls::kernel::KernelConnection;
use tokio_rustls::rustls::server::ServerConnectionData;
use tokio_rustls::rustls::{
    AlertDescription, ConnectionTrafficSecrets, Error, ExtractedSecrets, HandshakeType, InvalidMessage,
    PeerMisbehaved, SupportedCipherSuite,
};

/// Type, version and length.
pub(crate) const HEADER: usize = 5;

/// What follows the content: its true type, and the tag of all three ciphers of TLS 1.3.
pub(crate) const TRAILER: usize = 1 + TAG;

const TAG: usize = 16;

/// Most content of a record.
pub(crate) const CONTENT_MAX: usize = 1 << 14;

/// Most bytes after the header: content, type, padding and tag (RFC 8446, section 5.2).
const SEALED_MAX: usize = CONTENT_MAX + 256;

/// Longest record that is taken.
pub(crate) const RECORD_MAX: usize = HEADER + SEALED_MAX;

/// Records that may come in a row without a byte of the application: padding, tickets, changes of keys.
const FRUITLESS_MAX: u8 = 32;

/// Levels of alerts. TLS 1.3 has nothing to do with them but that they are there (RFC 8446, section 6).
const WARNING: u8 = 1;
const FATAL: u8 = 2;

const KEY_UPDATE: u8 = 24;
const NEW_SESSION_TICKET: u8 = 4;

/// What a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Content {
    Alert = 21,
    Handshake = 22,
    Application = 23,
}

/// What was in a record.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Bytes of the application, and where they lie in the record.
    Data(Range<usize>),
    /// The peer says nothing more.
    Closed,
    /// Nothing that concerns the application.
    Nothing,
}

/// The length of the record that `bytes` begin with; none if its header is not complete.
///
/// # Errors
/// It is no record.
pub(crate) fn length(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let [kind, _, _, high, low] = *header;
    // Change cipher spec, which means nothing in TLS 1.3, and the three of above.
    if !(20..=23).contains(&kind) {
        return Err(InvalidMessage::InvalidContentType.into());
    }
    let sealed = usize::from(u16::from_be_bytes([high, low]));
    if sealed > SEALED_MAX {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok(Some(HEADER + sealed))
}

/// An alert in the clear: there are no keys yet.
pub(crate) fn unsealed_alert(description: AlertDescription) -> [u8; HEADER + 2] {
    [Content::Alert as u8, 3, 3, 0, 2, FATAL, u8::from(description)]
}

/// The keys of a connection whose handshake is done.
pub(crate) struct Session {
    sealing: Protection,
    opening: Protection,
    keys: Keys,
    /// How many records may be sealed with one key.
    limit: u64,
    /// The peer wants this end to change its key too.
    update_asked: bool,
    fruitless: u8,
}

/// Where the next keys come from.
pub(super) enum Keys {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl Session {
    pub(super) fn new(
        secrets: ExtractedSecrets,
        keys: Keys,
        suite: SupportedCipherSuite,
    ) -> Result<Self, Error> {
        let suite = suite.tls13().ok_or(Error::HandshakeNotComplete)?;
        Ok(Self {
            sealing: Protection::new(secrets.tx)?,
            opening: Protection::new(secrets.rx)?,
            keys,
            // Half of it: a batch of records is sealed before it is looked at again.
            limit: suite.common.confidentiality_limit / 2,
            update_asked: false,
            fruitless: 0,
        })
    }

    /// Seals application data. `record` has [`HEADER`] bytes for the header, the content, and [`TRAILER`] bytes.
    ///
    /// # Errors
    /// The session has sealed all that it may.
    pub(crate) fn seal(&mut self, record: &mut [u8]) -> Result<(), Error> {
        self.sealing.seal(record, Content::Application)
    }

    /// A record that has to go before the next one, if one has to: this end changes its key.
    ///
    /// # Errors
    /// The session has sealed all that it may.
    pub(crate) fn due(&mut self) -> Result<Option<Vec<u8>>, Error> {
        if !self.update_asked && self.sealing.sealed < self.limit {
            return Ok(None);
        }
        self.update_asked = false;
        // No update is asked of the peer: it counts by itself.
        let record = self.sealing.seal_message(&[KEY_UPDATE, 0, 0, 1, 0], Content::Handshake)?;
        self.sealing = Protection::new(self.keys.next_sealing()?)?;
        Ok(Some(record))
    }

    /// The record that says that this end says nothing more.
    ///
    /// # Errors
    /// The session has sealed all that it may.
    pub(crate) fn close_notify(&mut self) -> Result<Vec<u8>, Error> {
        self.sealing.seal_message(&[WARNING, u8::from(AlertDescription::CloseNotify)], Content::Alert)
    }

    /// The record that says why this end breaks the session off.
    ///
    /// # Errors
    /// The session has sealed all that it may.
    pub(crate) fn fatal_alert(&mut self, description: AlertDescription) -> Result<Vec<u8>, Error> {
        self.sealing.seal_message(&[FATAL, u8::from(description)], Content::Alert)
    }

    /// Opens one record, whole and where it lies.
    ///
    /// # Errors
    /// It is not of this session, the peer breaks the protocol, or it ends the session with an alert.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<Opened, Error> {
        let (content, bytes) = self.opening.open(record)?;
        let opened = match content {
            Content::Application => Opened::Data(bytes),
            Content::Alert => Self::alert(&record[bytes])?,
            Content::Handshake => {
                self.message(&record[bytes])?;
                Opened::Nothing
            }
        };
        match &opened {
            Opened::Data(bytes) if bytes.is_empty() => {}
            Opened::Nothing => {}
            Opened::Data(_) | Opened::Closed => {
                self.fruitless = 0;
                return Ok(opened);
            }
        }
        self.fruitless += 1;
        if self.fruitless > FRUITLESS_MAX {
            return Err(PeerMisbehaved::TooManyEmptyFragments.into());
        }
        Ok(Opened::Nothing)
    }

    fn alert(alert: &[u8]) -> Result<Opened, Error> {
        let [_, description] = *alert else { return Err(InvalidMessage::MessageTooShort.into()) };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Ok(Opened::Closed),
            // Some announce close_notify by it (RFC 8446, section 6.1).
            AlertDescription::UserCanceled => Ok(Opened::Nothing),
            description => Err(Error::AlertReceived(description)),
        }
    }

    /// What may come after a handshake. A message that is spread over several records is refused: nothing that is expected is so long.
    fn message(&mut self, mut messages: &[u8]) -> Result<(), Error> {
        if messages.is_empty() {
            return Err(InvalidMessage::InvalidEmptyPayload.into());
        }
        while let [kind, a, b, c, rest @ ..] = messages {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            let Some((message, rest)) = rest.split_at_checked(length) else { break };
            messages = rest;
            match (*kind, message, &self.keys) {
                (KEY_UPDATE, [asks @ (0 | 1)], _) => {
                    // What follows is sealed with the next key, so nothing may follow in this record.
                    if !messages.is_empty() {
                        return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                    }
                    self.update_asked |= *asks == 1;
                    self.opening = Protection::new(self.keys.next_opening()?)?;
                }
                // Nothing is resumed.
                (NEW_SESSION_TICKET, _, Keys::Client(_)) => {}
                _ => {
                    return Err(Error::InappropriateHandshakeMessage {
                        expect_types: vec![HandshakeType::KeyUpdate],
                        got_type: HandshakeType::from(*kind),
                    });
                }
            }
        }
        if messages.is_empty() { Ok(()) } else { Err(InvalidMessage::MessageTooShort.into()) }
    }
}

impl Keys {
    fn next_sealing(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(keys) => keys.update_tx_secret(),
            Self::Server(keys) => keys.update_tx_secret(),
        }
    }

    fn next_opening(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(keys) => keys.update_rx_secret(),
            Self::Server(keys) => keys.update_rx_secret(),
        }
    }
}

/// One direction's key, and which record comes next.
struct Protection {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    /// Records sealed or opened with this key so far, which is the number of the next one.
    sealed: u64,
}

impl Protection {
    fn new((next, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv): (&'static Algorithm, _, _) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("the cipher of the session is not known here".into())),
        };
        let unusable = || Error::General("the keys of the session do not fit its cipher".into());
        let key = UnboundKey::new(algorithm, key.as_ref()).map_err(|_| unusable())?;
        let iv = iv.as_ref().try_into().map_err(|_| unusable())?;
        Ok(Self { key: LessSafeKey::new(key), iv, sealed: next })
    }

    /// The nonce of the next record (RFC 8446, section 5.3).
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce.iter_mut().skip(NONCE_LEN - 8).zip(self.sealed.to_be_bytes()) {
            *byte ^= number;
        }
        self.sealed = self.sealed.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    fn seal(&mut self, record: &mut [u8], content: Content) -> Result<(), Error> {
        let nonce = self.nonce()?;
        let (header, sealed) = record.split_first_chunk_mut::<HEADER>().ok_or(Error::EncryptError)?;
        let [high, low] = u16::try_from(sealed.len()).map_err(|_| Error::EncryptError)?.to_be_bytes();
        *header = [Content::Application as u8, 3, 3, high, low];
        let (inner, tag) = sealed.split_last_chunk_mut::<TAG>().ok_or(Error::EncryptError)?;
        *inner.last_mut().ok_or(Error::EncryptError)? = content as u8;
        let made = self.key.seal_in_place_separate_tag(nonce, Aad::from(*header), inner);
        tag.copy_from_slice(made.map_err(|_| Error::EncryptError)?.as_ref());
        Ok(())
    }

    /// A record of a few bytes that are no application data.
    fn seal_message(&mut self, message: &[u8], content: Content) -> Result<Vec<u8>, Error> {
        let mut record = vec![0; HEADER + message.len() + TRAILER];
        record[HEADER..HEADER + message.len()].copy_from_slice(message);
        self.seal(&mut record, content)?;
        Ok(record)
    }

    /// What a record carries, and where its content lies in it once it is opened.
    fn open(&mut self, record: &mut [u8]) -> Result<(Content, Range<usize>), Error> {
        let nonce = self.nonce()?;
        let (header, sealed) = record.split_first_chunk_mut::<HEADER>().ok_or(Error::DecryptError)?;
        if header[0] != Content::Application as u8 {
            return Err(InvalidMessage::InvalidContentType.into());
        }
        let inner = self.key.open_in_place(nonce, Aad::from(*header), sealed);
        let inner = inner.map_err(|_| Error::DecryptError)?;
        // Zeros are padding; the last other byte is the type.
        let end =
            inner.iter().rposition(|byte| *byte != 0).ok_or(PeerMisbehaved::IllegalTlsInnerPlaintext)?;
        if end > CONTENT_MAX {
            return Err(Error::PeerSentOversizedRecord);
        }
        let content = match inner[end] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Application,
            _ => return Err(InvalidMessage::InvalidContentType.into()),
        };
        Ok((content, HEADER..HEADER + end))
    }
}

#[cfg(test)]
mod tests;
