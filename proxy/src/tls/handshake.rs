//! The handshake of a session, driven by hand over a socket, so that what comes after it needs nothing of rustls but keys.
//!
//! rustls is shown record by record and never one that follows the handshake: those are opened by [`Session`] alone.

use super::record::{self, Keys, Session};
use bytes::BufMut;
use rustls_pki_types::ServerName;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use tokio_rustls::rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use tokio_rustls::rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus,
};
use tokio_rustls::rustls::{ClientConfig, CommonState, Error, ExtractedSecrets, ServerConfig};
use weft_identity::certificate::PeerIdentity;
use weft_identity::tls::peer_identity;

/// Most bytes of a handshake that are held: one record of the longest, and what one read may bring behind it. Flights of sidecars have
/// some 2 KiB.
pub(crate) const INPUT_MAX: usize = record::RECORD_MAX + READ_BYTES;

/// What is read at once: more than the other end's flight has.
const READ_BYTES: usize = 4096;

/// What a handshake has left.
pub(crate) struct Established {
    pub(crate) session: Session,
    pub(crate) negotiated: Negotiated,
    /// What came behind the handshake: records of the session.
    pub(crate) received: Vec<u8>,
    /// The end of the handshake, to be sent before anything else; empty for a server.
    pub(crate) unsent: Vec<u8>,
}

/// What the two ends agreed on, and who the other one is.
pub(crate) struct Negotiated {
    pub(crate) tls: Option<&'static str>,
    pub(crate) key_exchange: Option<&'static str>,
    pub(crate) protocol: Option<Vec<u8>>,
    pub(crate) peer: PeerIdentity,
}

/// Connects: a client's handshake.
///
/// # Errors
/// The handshake fails or the connection breaks. An error of rustls is the source of the [`io::Error`].
pub(crate) async fn connect(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    socket: &mut TcpStream,
) -> io::Result<Established> {
    drive(UnbufferedClientConnection::new(config, name).map_err(broken)?, socket).await
}

/// Accepts: a server's handshake.
///
/// # Errors
/// As [`connect`].
pub(crate) async fn accept(config: Arc<ServerConfig>, socket: &mut TcpStream) -> io::Result<Established> {
    drive(UnbufferedServerConnection::new(config).map_err(broken)?, socket).await
}

/// What both ends' handshakes do.
trait Handshake {
    type Data;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn finish(self) -> Result<(ExtractedSecrets, Keys), Error>;
}

impl Handshake for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn finish(self) -> Result<(ExtractedSecrets, Keys), Error> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Keys::Client(Box::new(keys))))
    }
}

impl Handshake for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }

    fn common(&self) -> &CommonState {
        self
    }

    fn finish(self) -> Result<(ExtractedSecrets, Keys), Error> {
        let (secrets, keys) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Keys::Server(Box::new(keys))))
    }
}

/// What one step of a handshake asks for.
enum Step {
    /// To be called again.
    Again,
    /// More of the peer.
    Blocked,
    Done,
}

async fn drive<H: Handshake>(mut handshake: H, socket: &mut TcpStream) -> io::Result<Established> {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    // How much of the input rustls is shown: whole records.
    let mut shown = 0;
    loop {
        let (used, step) = match step(&mut handshake, &mut input[..shown], &mut output) {
            Ok(stepped) => stepped,
            Err(error) => {
                // The peer shall hear why, if it still listens. The alert comes before anything else is looked at.
                let _ = step(&mut handshake, &mut input[..shown], &mut output);
                let _ = socket.write_all(&output).await;
                return Err(broken(error));
            }
        };
        input.drain(..used);
        shown -= used;
        match step {
            Step::Again => {}
            Step::Done => break,
            Step::Blocked => {
                if let Some(length) = record::length(&input[shown..]).map_err(broken)?
                    && input.len() >= shown + length
                {
                    shown += length;
                    continue;
                }
                socket.write_all(&output).await?;
                output.clear();
                read(socket, &mut input).await?;
            }
        }
    }
    let (session, negotiated) = finish(handshake).map_err(broken)?;
    Ok(Established { session, negotiated, received: input, unsent: output })
}

fn finish<H: Handshake>(handshake: H) -> Result<(Session, Negotiated), Error> {
    let common = handshake.common();
    let suite = common.negotiated_cipher_suite().ok_or(Error::HandshakeNotComplete)?;
    // The verifiers let nobody pass whose leaf cannot be read.
    let peer = peer_identity(common.peer_certificates()).ok().flatten();
    let negotiated = Negotiated {
        tls: common.protocol_version().and_then(|version| version.as_str()),
        key_exchange: common.negotiated_key_exchange_group().and_then(|group| group.name().as_str()),
        protocol: common.alpn_protocol().map(<[u8]>::to_vec),
        peer: peer.ok_or(Error::NoCertificatesPresented)?,
    };
    let (secrets, keys) = handshake.finish()?;
    Ok((Session::new(secrets, keys, suite)?, negotiated))
}

/// One step. Returns how many bytes of the input are done with.
fn step<H: Handshake>(
    handshake: &mut H,
    input: &mut [u8],
    output: &mut Vec<u8>,
) -> Result<(usize, Step), Error> {
    let UnbufferedStatus { discard, state } = handshake.process(input);
    let step = match state? {
        ConnectionState::EncodeTlsData(data) => {
            encode(data, output)?;
            Step::Again
        }
        // Sent with what follows it, or when there is nothing more to do.
        ConnectionState::TransmitTlsData(transmit) => {
            transmit.done();
            Step::Again
        }
        ConnectionState::BlockedHandshake => Step::Blocked,
        // A server may write before the client has finished; this one does not.
        ConnectionState::WriteTraffic(_) => Step::Done,
        ConnectionState::PeerClosed | ConnectionState::Closed => return Err(Error::HandshakeNotComplete),
        _ => return Err(Error::General("application data in the handshake".into())),
    };
    let step = match step {
        Step::Done if handshake.common().is_handshaking() => Step::Blocked,
        step => step,
    };
    Ok((discard, step))
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, output: &mut Vec<u8>) -> Result<(), Error> {
    let from = output.len();
    let required = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => required_size,
        Ok(_) | Err(EncodeError::AlreadyEncoded) => return Ok(()),
    };
    output.resize(from + required, 0);
    data.encode(&mut output[from..]).map_err(|error| Error::General(error.to_string()))?;
    Ok(())
}

async fn read(socket: &mut TcpStream, input: &mut Vec<u8>) -> io::Result<()> {
    let room = READ_BYTES.min(INPUT_MAX.saturating_sub(input.len()));
    if room == 0 {
        return Err(broken(Error::PeerSentOversizedRecord));
    }
    input.reserve_exact(room);
    match socket.read_buf(&mut input.limit(room)).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// As those who read streams expect it: the cause can be told from it.
pub(crate) fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
