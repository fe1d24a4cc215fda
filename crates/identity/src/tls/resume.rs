//! Sessions that are resumed, between controllers and those who come back to them: without certificates and signatures, for
//! less than half the work. A fleet that lost its controller comes back at once, so that counts there, and there alone.
//!
//! A resumed handshake checks nobody: the peer is whom the handshake before it found, and has shown that it holds a secret of that one. So
//! each end checks the peer's leaf again, with the code and the roots of now ([`ResumingServer::admit`],
//! [`ResumingClient::admit`]): nobody comes in whom a whole handshake would refuse for its leaf. Beyond that, nothing outlives what it
//! rests on:
//! - a client's tickets are of one credential; with a renewed leaf, or other roots, it starts anew;
//! - a server's tickets are of one set of roots, and of one process.
//!
//! The key exchange is as in every handshake, hybrid and new each time, so a ticket that leaks opens nothing that was recorded.
//! Data is never sent early.

use super::verify::{ClientVerifier, ServerVerifier};
use super::{
    ClientAuth, ExpectedPeer, InUse, PeerRejection, Source, TlsIdentity, only_tls13, owned, peer_identity,
    provider,
};
use crate::certificate::PeerIdentity;
use rustls::client::{Resumption, Tls12Resumption};
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::server::ProducesTickets;
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ClientConnection, Error, HandshakeKind, ServerConfig, ServerConnection};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use weft_model::Timestamp;

/// Tickets for each whole or resumed handshake: one to come back with, and one if that attempt is lost.
const TICKETS: usize = 2;
/// Controllers whose tickets a client keeps: more than a mesh has. rustls keeps up to eight of each.
const CONTROLLERS_MAX: usize = 8;

/// A server that lets its clients resume.
#[derive(Clone, Debug)]
pub struct ResumingServer {
    config: Arc<ServerConfig>,
    verifier: Arc<ClientVerifier>,
    auth: ClientAuth,
    clock: Arc<dyn TimeProvider>,
}

impl ResumingServer {
    pub(super) fn new(
        identity: &TlsIdentity,
        auth: ClientAuth,
        expected: ExpectedPeer,
        alpn: &[&[u8]],
    ) -> Result<Self, Error> {
        let verifier = Arc::new(ClientVerifier::new(identity.source.clone(), expected, auth));
        let mut config = identity.server_builder(verifier.clone(), alpn);
        config.ticketer = Arc::new(Tickets::new(identity.source.clone())?);
        config.send_tls13_tickets = TICKETS;
        Ok(Self { config: Arc::new(config), verifier, auth, clock: identity.clock.clone() })
    }

    /// What to accept with. A connection is good only once it is [admitted](Self::admit).
    #[must_use]
    pub const fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// Who has come, on a connection whose handshake is done; none if it presented no certificate.
    ///
    /// # Errors
    /// It resumed, and would not pass a whole handshake now.
    pub fn admit(&self, connection: &ServerConnection) -> Result<Option<PeerIdentity>, Error> {
        let certificates = connection.peer_certificates();
        if !was_whole(connection.handshake_kind()) {
            match certificates.and_then(<[_]>::first) {
                Some(leaf) => self.verifier.verify(leaf, now(&*self.clock)?)?,
                None if self.auth == ClientAuth::Required => return Err(Error::NoCertificatesPresented),
                None => {}
            }
        }
        peer_identity(certificates).map_err(|error| PeerRejection::Certificate(error).into())
    }
}

/// A server's tickets, which only this process can read, and only while the roots are those that they were made under.
struct Tickets {
    source: Arc<Source>,
    made: Mutex<Made>,
}

struct Made {
    roots: Vec<CertificateDer<'static>>,
    ticketer: Arc<dyn ProducesTickets>,
}

impl Tickets {
    fn new(source: Arc<Source>) -> Result<Self, Error> {
        let roots = source.0.load().credential.roots().to_vec();
        Ok(Self { source, made: Mutex::new(Made { roots, ticketer: Ticketer::new()? }) })
    }

    fn of_these_roots(&self) -> Option<Arc<dyn ProducesTickets>> {
        let own = self.source.0.load();
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.roots != own.credential.roots() {
            // Without random numbers there are no tickets, and every handshake is a whole one.
            *made = Made { roots: own.credential.roots().to_vec(), ticketer: Ticketer::new().ok()? };
        }
        Some(made.ticketer.clone())
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").finish_non_exhaustive()
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).ticketer.lifetime()
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.of_these_roots()?.encrypt(plain)
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.of_these_roots()?.decrypt(cipher)
    }
}

/// A client that resumes where it was before. Clones share the tickets.
#[derive(Clone, Debug)]
pub struct ResumingClient {
    identity: TlsIdentity,
    expected: ExpectedPeer,
    alpn: Vec<Vec<u8>>,
    current: Arc<Mutex<Option<Attempt>>>,
}

/// How one connection is made: with one credential, and its tickets.
#[derive(Clone, Debug)]
pub struct Attempt {
    own: Arc<InUse>,
    config: Arc<ClientConfig>,
    verifier: Arc<ServerVerifier>,
}

impl Attempt {
    /// What to connect with. A connection is good only once it is [admitted](ResumingClient::admit).
    #[must_use]
    pub const fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }
}

impl ResumingClient {
    pub(super) fn new(identity: TlsIdentity, expected: ExpectedPeer, alpn: &[&[u8]]) -> Self {
        Self { identity, expected, alpn: owned(alpn), current: Arc::default() }
    }

    /// How to connect now.
    #[must_use]
    pub fn attempt(&self) -> Attempt {
        let own = self.identity.source.0.load_full();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(attempt) = &*current
            && Arc::ptr_eq(&attempt.own, &own)
            // With a leaf that has ended there is nothing to resume; a whole handshake says why.
            && now(&*self.identity.clock).is_ok_and(|now| !has_ended(&own, now))
        {
            return attempt.clone();
        }
        current.insert(self.begin(own)).clone()
    }

    /// Forgets all tickets: the next attempt is a whole handshake.
    pub fn forget(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// With this credential, and no tickets yet.
    fn begin(&self, own: Arc<InUse>) -> Attempt {
        // Of this one credential, whatever becomes of the identity: tickets belong to it.
        let source = Arc::new(Source(own.clone().into()));
        let verifier =
            Arc::new(ServerVerifier::Member { source: source.clone(), expected: self.expected.clone() });
        let builder = ClientConfig::builder_with_details(provider::provider(), self.identity.clock.clone());
        let mut config = only_tls13(builder)
            .dangerous()
            .with_custom_certificate_verifier(verifier.clone())
            .with_client_cert_resolver(source);
        config.resumption =
            Resumption::in_memory_sessions(CONTROLLERS_MAX).tls12_resumption(Tls12Resumption::Disabled);
        config.enable_early_data = false;
        config.alpn_protocols.clone_from(&self.alpn);
        Attempt { own, config: Arc::new(config), verifier }
    }

    /// Checks whom an attempt has reached, on a connection whose handshake is done.
    ///
    /// # Errors
    /// It resumed, and the server would not pass a whole handshake now. The next attempt is one.
    pub fn admit(&self, attempt: &Attempt, connection: &ClientConnection) -> Result<(), Error> {
        if was_whole(connection.handshake_kind()) {
            return Ok(());
        }
        let checked = self.check_again(attempt, connection);
        // A leaf past its middle was renewed since. The session knows the old one alone, and would be refused when that ends.
        if !matches!(checked, Ok(Age::Young)) {
            self.forget();
        }
        checked.map(drop)
    }

    fn check_again(&self, attempt: &Attempt, connection: &ClientConnection) -> Result<Age, Error> {
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or(Error::NoCertificatesPresented)?;
        let now = now(&*self.identity.clock)?;
        attempt.verifier.verify(leaf, &[], now)?;
        let server = PeerIdentity::from_certificate(leaf).map_err(PeerRejection::Certificate)?;
        let middle = server.not_before.0.midpoint(server.not_after.0);
        Ok(if seconds(Timestamp(middle)) < now.as_secs() { Age::Old } else { Age::Young })
    }
}

/// How old a server's leaf is.
enum Age {
    Young,
    Old,
}

/// Whether a handshake checked the peer; nothing else is taken for one that did.
const fn was_whole(kind: Option<HandshakeKind>) -> bool {
    matches!(kind, Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest))
}

fn now(clock: &dyn TimeProvider) -> Result<UnixTime, Error> {
    clock.current_time().ok_or(Error::FailedToGetCurrentTime)
}

fn has_ended(own: &InUse, now: UnixTime) -> bool {
    seconds(own.credential.identity().not_after) < now.as_secs()
}

fn seconds(time: Timestamp) -> u64 {
    u64::try_from(time.0).unwrap_or_default() / 1_000
}
