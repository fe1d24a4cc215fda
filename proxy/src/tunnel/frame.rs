//! The frames of a tunnel: OPEN by the client, OPENED or REFUSED by the server, then DATA and END of both. One byte of kind, three
//! of length, big endian, then what the kind says; a protobuf message for the first three. `docs/tunnel.md` holds the format and test
//! vectors.
//!
//! What a peer sends is not trusted: lengths are bounded before anything is allocated, names and ports are parsed into
//! the model's types, and whatever is not understood is an error.

use prost::Message;
use std::io;
use std::net::SocketAddr;
use uuid::Uuid;
use weft_model::{CloseReason, ConfigVersion, Epoch, Port, Position, ServiceName};

/// Most bytes of a message. The longest OPEN has about 250 bytes; the rest is room for a refusal's words and for fields to
/// come.
pub(crate) const MESSAGE_BYTES_MAX: usize = 4096;

/// Longest text in a refusal that is sent, in bytes, so that a message always stays below its bound.
const TEXT_BYTES_MAX: usize = 1024;

/// Kind and length.
pub(crate) const HEADER: usize = 4;

/// How every frame begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    /// Bytes that follow, and belong to it.
    pub(crate) length: usize,
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bytes of the application.
    Data,
    /// The application's stream ends in this direction; no bytes follow.
    End,
    /// A message about a stream.
    Message(MessageKind),
}

/// Which message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MessageKind {
    Open,
    Opened,
    Refused,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::End => 1,
            Self::Message(MessageKind::Open) => 16,
            Self::Message(MessageKind::Opened) => 17,
            Self::Message(MessageKind::Refused) => 18,
        }
    }
}

impl Head {
    /// Of the end of a direction.
    pub(crate) const END: Self = Self { kind: Kind::End, length: 0 };

    /// Of bytes of the application.
    pub(crate) const fn data(length: usize) -> Self {
        Self { kind: Kind::Data, length }
    }

    /// As it is sent. Nobody sends more at once than a length can say.
    #[expect(clippy::cast_possible_truncation, reason = "callers send at most a record's content")]
    pub(crate) const fn encode(self) -> [u8; HEADER] {
        let [_, a, b, c] = (self.length as u32).to_be_bytes();
        [self.kind.byte(), a, b, c]
    }

    /// Reads what [`Head::encode`] wrote.
    pub(crate) fn decode([kind, a, b, c]: [u8; HEADER]) -> Result<Self, FrameError> {
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let (kind, most) = match kind {
            0 => (Kind::Data, usize::MAX),
            1 => (Kind::End, 0),
            16 => (Kind::Message(MessageKind::Open), MESSAGE_BYTES_MAX),
            17 => (Kind::Message(MessageKind::Opened), MESSAGE_BYTES_MAX),
            18 => (Kind::Message(MessageKind::Refused), MESSAGE_BYTES_MAX),
            _ => return Err(FrameError::Kind(kind)),
        };
        if length > most { Err(FrameError::TooLong(length)) } else { Ok(Self { kind, length }) }
    }
}

/// A message about a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Open(Open),
    Opened,
    Refused(Refused),
}

/// The client wants a stream to a port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) service: ServiceName,
    pub(crate) port: Port,
    /// Where the application's connection came from, as the client's sidecar saw it.
    pub(crate) source: SocketAddr,
    /// Names the connection in the records of both ends.
    pub(crate) connection_id: Uuid,
    /// What the client's sidecar runs.
    pub(crate) version: ConfigVersion,
}

/// The server does not open the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) reason: CloseReason,
    /// The rule that refuses, if it is one.
    pub(crate) rule: Option<String>,
    /// More, in words.
    pub(crate) detail: String,
    /// What the server's sidecar runs; none if nothing.
    pub(crate) version: Option<ConfigVersion>,
}

/// Bytes are not the frame that is expected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("frame of {0} bytes is longer than its kind may be")]
    TooLong(usize),
    #[error("frame is not readable")]
    Encoding(#[from] prost::DecodeError),
    #[error("frame has a malformed {0}")]
    Field(&'static str),
    #[error("frame of an unknown kind, {0}")]
    Kind(u8),
    #[error("frame of application data between two streams")]
    Data,
    #[error("message within a stream")]
    Message,
    #[error("something behind the end of a stream that the other direction has not ended")]
    AfterEnd,
    #[error("connection broke in a frame")]
    Io(#[from] io::Error),
}

impl Frame {
    /// The message with its head.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (kind, message) = match self {
            Self::Open(open) => (MessageKind::Open, open.to_wire().encode_to_vec()),
            Self::Opened => (MessageKind::Opened, wire::Opened {}.encode_to_vec()),
            Self::Refused(refused) => (MessageKind::Refused, refused.to_wire().encode_to_vec()),
        };
        let head = Head { kind: Kind::Message(kind), length: message.len() };
        [&head.encode()[..], &message].concat()
    }

    /// Reads the message after the head.
    pub(crate) fn decode(kind: MessageKind, message: &[u8]) -> Result<Self, FrameError> {
        match kind {
            MessageKind::Open => Ok(Self::Open(wire::Open::decode(message)?.try_into()?)),
            MessageKind::Opened => wire::Opened::decode(message).map(|_| Self::Opened).map_err(Into::into),
            MessageKind::Refused => Ok(Self::Refused(wire::Refused::decode(message)?.try_into()?)),
        }
    }
}

impl Open {
    fn to_wire(&self) -> wire::Open {
        wire::Open {
            service: self.service.to_string(),
            port: u32::from(self.port.number()),
            source_address: self.source.to_string(),
            connection_id: self.connection_id.as_bytes().to_vec(),
            version: Some(self.version.into()),
        }
    }
}

impl Refused {
    fn to_wire(&self) -> wire::Refused {
        wire::Refused {
            reason: self.reason.as_str().to_owned(),
            rule: shortened(self.rule.as_deref().unwrap_or_default()),
            detail: shortened(&self.detail),
            version: self.version.map(Into::into),
        }
    }
}

impl TryFrom<wire::Open> for Open {
    type Error = FrameError;

    fn try_from(open: wire::Open) -> Result<Self, FrameError> {
        let port = u16::try_from(open.port).ok().and_then(Port::new);
        Ok(Self {
            service: open.service.parse().map_err(|_| FrameError::Field("service"))?,
            port: port.ok_or(FrameError::Field("port"))?,
            source: open.source_address.parse().map_err(|_| FrameError::Field("source address"))?,
            connection_id: Uuid::from_slice(&open.connection_id)
                .map_err(|_| FrameError::Field("connection id"))?,
            version: open.version.ok_or(FrameError::Field("version"))?.into(),
        })
    }
}

impl TryFrom<wire::Refused> for Refused {
    type Error = FrameError;

    fn try_from(refused: wire::Refused) -> Result<Self, FrameError> {
        Ok(Self {
            reason: refused.reason.parse().map_err(|_| FrameError::Field("reason"))?,
            rule: (!refused.rule.is_empty()).then_some(refused.rule),
            detail: refused.detail,
            version: refused.version.map(Into::into),
        })
    }
}

impl From<ConfigVersion> for wire::Version {
    fn from(version: ConfigVersion) -> Self {
        Self { epoch: version.epoch.0, position: version.position.0 }
    }
}

impl From<wire::Version> for ConfigVersion {
    fn from(version: wire::Version) -> Self {
        Self::new(Epoch(version.epoch), Position(version.position))
    }
}

fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
}

/// The protobuf messages. Numbers once given are never given to anything else.
mod wire {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Open {
        #[prost(string, tag = "1")]
        pub(super) service: String,
        #[prost(uint32, tag = "2")]
        pub(super) port: u32,
        #[prost(string, tag = "3")]
        pub(super) source_address: String,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) connection_id: Vec<u8>,
        #[prost(message, optional, tag = "5")]
        pub(super) version: Option<Version>,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Message)]
    pub(super) struct Opened {}

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Refused {
        #[prost(string, tag = "1")]
        pub(super) reason: String,
        #[prost(string, tag = "2")]
        pub(super) rule: String,
        #[prost(string, tag = "3")]
        pub(super) detail: String,
        #[prost(message, optional, tag = "4")]
        pub(super) version: Option<Version>,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Message)]
    pub(super) struct Version {
        #[prost(uint64, tag = "1")]
        pub(super) epoch: u64,
        #[prost(uint64, tag = "2")]
        pub(super) position: u64,
    }
}

#[cfg(test)]
pub(crate) mod fuzz;
#[cfg(test)]
mod tests;
