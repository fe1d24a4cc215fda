//! The handshake of a session, driven by hand over a socket, so that what comes after it needs nothing of rustls but keys.
//!
//! rustls is shown record by record and never one that follows the handshake: those are opened by [`Session`] alone.

use super::hello::{self, Hello, Offered};
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
use tokio_rustls::rustls::{
    AlertDescription, ClientConfig, CommonState, Error, ExtractedSecrets, ServerConfig,
};
use weft_identity::certificate::PeerIdentity;
use weft_identity::tls::peer_identity;
use weft_model::DnsName;

/// Most bytes of a handshake that are held: one record of the longest, and what one read may bring behind it. Flights of sidecars have
/// some 2 KiB.
pub(crate) const INPUT_MAX: usize = record::RECORD_MAX + READ_BYTES;

/// What is read at once: more than the other end's flight has.
const READ_BYTES: usize = 4096;

/// A client of PostgreSQL asks by this whether the server speaks TLS, before it does, unless it is told to begin with TLS (`SSLRequest` in
/// PostgreSQL's documentation of its protocol, and the server's yes). Nothing that is not sealed follows, and nobody takes it for the application's.
const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 4, 210, 22, 47];
const SSL_ANSWER: &[u8] = b"S";

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
    /// What a client asks for that is no sidecar.
    pub(crate) wanted: Option<DnsName>,
}

/// There is no session.
pub(crate) enum Failure {
    /// The handshake fails or the connection breaks. An error of rustls is the source of the [`io::Error`].
    Io(io::Error),
    /// The client asks for what is not here, and was told so.
    Name(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
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
    let client = UnbufferedClientConnection::new(config, name).map_err(broken)?;
    drive(client, socket, Vec::new()).await.map_err(|stop| match stop {
        Stop::Io(error) => error,
        Stop::Heard(..) => broken(Error::General("a client heard a hello".into())),
    })
}

/// Accepts: a server's handshake. `config` listens to hellos ([`hello::Listening`]); `other` is the one for clients that are no sidecars, and
/// offer these protocols.
///
/// # Errors
/// As [`connect`], and if a client that is no sidecar asks for another service.
pub(crate) async fn accept(
    config: Arc<ServerConfig>,
    other: impl FnOnce(Offered) -> Arc<ServerConfig> + Send,
    socket: &mut TcpStream,
) -> Result<Established, Failure> {
    let server = UnbufferedServerConnection::new(config).map_err(broken)?;
    let (hello, input) = match drive(server, socket, Vec::new()).await {
        Ok(established) => return Ok(established),
        Err(Stop::Io(error)) => return Err(error.into()),
        Err(Stop::Heard(hello, input)) => (hello, input),
    };
    let wanted = match hello.wanted {
        Ok(wanted) => wanted,
        Err(detail) => {
            let _ = socket.write_all(&record::unsealed_alert(AlertDescription::UnrecognisedName)).await;
            return Err(Failure::Name(detail));
        }
    };
    // From the beginning, with the same hello: nothing was answered yet.
    let server = UnbufferedServerConnection::new(other(hello.offered)).map_err(broken)?;
    match drive(server, socket, input).await {
        Ok(Established { negotiated, session, received, unsent }) => {
            let negotiated = Negotiated { wanted: Some(wanted), ..negotiated };
            Ok(Established { session, negotiated, received, unsent })
        }
        Err(Stop::Io(error)) => Err(error.into()),
        Err(Stop::Heard(..)) => Err(broken(Error::General("a hello was heard twice".into())).into()),
    }
}

/// Why driving a handshake stopped before its end.
enum Stop {
    Io(io::Error),
    /// A client that is no sidecar cannot go on with this configuration. Nothing was sent to it; what it sent is here.
    Heard(Hello, Vec<u8>),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What both ends' handshakes do.
trait Handshake {
    type Data;

    /// Whether clients that ask in the clear whether there is TLS are answered.
    const ANSWERS: bool;

    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn finish(self) -> Result<(ExtractedSecrets, Keys), Error>;
}

impl Handshake for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    const ANSWERS: bool = false;

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

    const ANSWERS: bool = true;

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

/// `input` is what has come already.
async fn drive<H: Handshake>(
    mut handshake: H,
    socket: &mut TcpStream,
    mut input: Vec<u8>,
) -> Result<Established, Stop> {
    let mut output = Vec::new();
    // How much of the input rustls is shown: whole records.
    let mut shown = 0;
    let mut wanted = None;
    let mut asked = false;
    loop {
        let stepped = step(&mut handshake, &mut input[..shown], &mut output);
        let heard = hello::take();
        let (used, step) = match stepped {
            Ok(stepped) => stepped,
            Err(error) => {
                // The input is as it came if the hello is its first record, and it is, unless a client makes itself difficult.
                if let Some(heard) = heard.filter(|_| record::length(&input) == Ok(Some(shown))) {
                    return Err(Stop::Heard(heard, input));
                }
                // The peer shall hear why, if it still listens. The alert comes before anything else is looked at.
                let _ = step(&mut handshake, &mut input[..shown], &mut output);
                let _ = socket.write_all(&output).await;
                return Err(broken(error).into());
            }
        };
        wanted = heard.and_then(|heard| heard.wanted.ok()).or(wanted);
        input.drain(..used);
        shown -= used;
        match step {
            Step::Again => {}
            Step::Done => break,
            Step::Blocked => {
                match record::length(&input[shown..]) {
                    Ok(Some(length)) if input.len() >= shown + length => {
                        shown += length;
                        continue;
                    }
                    Ok(_) => {}
                    Err(_) if H::ANSWERS && !asked && SSL_REQUEST.starts_with(&input) => {
                        if input.len() == SSL_REQUEST.len() {
                            asked = true;
                            input.clear();
                            socket.write_all(SSL_ANSWER).await?;
                        }
                    }
                    Err(error) => return Err(broken(error).into()),
                }
                socket.write_all(&output).await?;
                output.clear();
                read(socket, &mut input).await?;
            }
        }
    }
    let (session, negotiated) = finish(handshake, wanted).map_err(broken)?;
    Ok(Established { session, negotiated, received: input, unsent: output })
}

fn finish<H: Handshake>(handshake: H, wanted: Option<DnsName>) -> Result<(Session, Negotiated), Error> {
    let common = handshake.common();
    let suite = common.negotiated_cipher_suite().ok_or(Error::HandshakeNotComplete)?;
    // The verifiers let nobody pass whose leaf cannot be read.
    let peer = peer_identity(common.peer_certificates()).ok().flatten();
    let negotiated = Negotiated {
        tls: common.protocol_version().and_then(|version| version.as_str()),
        key_exchange: common.negotiated_key_exchange_group().and_then(|group| group.name().as_str()),
        protocol: common.alpn_protocol().map(<[u8]>::to_vec),
        peer: peer.ok_or(Error::NoCertificatesPresented)?,
        wanted,
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
