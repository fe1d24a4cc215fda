//! What the tests of several modules need: an authority, a settable clock, certificates of any shape, and handshakes
//! in memory.

use crate::ca::{CertificateAuthority, LEAF_LIFETIME};
use crate::credential::Credential;
use crate::spiffe::{SpiffeId, Subject};
use rcgen::{CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ClientConnection, ConnectionCommon, Error, ServerConfig, ServerConnection};
use rustls_pki_types::{ServerName, UnixTime};
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use weft_model::time::Timestamp;

/// When the tests play.
pub(crate) const NOW: Timestamp = Timestamp(1_800_000_000_000);

pub(crate) const API: &str = "spiffe://weft.test/ns/default/svc/api/inst/api-1";
pub(crate) const DB: &str = "spiffe://weft.test/ns/default/svc/db/inst/db-1";
pub(crate) const CONTROLLER: &str = "spiffe://weft.test/controller/c1";

pub(crate) fn authority() -> CertificateAuthority {
    CertificateAuthority::create(&"weft.test".parse().unwrap(), NOW).unwrap()
}

pub(crate) fn subject(id: &str) -> Subject {
    id.parse::<SpiffeId>().unwrap().subject
}

pub(crate) fn credential(authority: &CertificateAuthority, id: &str) -> Credential {
    authority.issue_credential(&subject(id), NOW, LEAF_LIFETIME).unwrap()
}

/// The leaf that an authority would issue, to be spoiled by a test.
pub(crate) fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    set_validity(&mut params, NOW, NOW.after(LEAF_LIFETIME));
    params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params
}

pub(crate) fn set_validity(params: &mut CertificateParams, not_before: Timestamp, not_after: Timestamp) {
    let since_1970 = |time: Timestamp| Duration::from_millis(u64::try_from(time.0).unwrap());
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_before);
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_1970(not_after);
}

/// A clock that stands still until it is set.
#[derive(Debug)]
pub(crate) struct Clock(AtomicI64);

impl Clock {
    pub(crate) fn at(now: Timestamp) -> Arc<Self> {
        Arc::new(Self(AtomicI64::new(now.0)))
    }

    pub(crate) fn set(&self, now: Timestamp) {
        self.0.store(now.0, Ordering::SeqCst);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let ms = u64::try_from(self.0.load(Ordering::SeqCst)).unwrap();
        Some(UnixTime::since_unix_epoch(Duration::from_millis(ms)))
    }
}

/// How a handshake ended for each side, alerts included.
pub(crate) struct Handshake {
    pub(crate) client: Result<ClientConnection, Error>,
    pub(crate) server: Result<ServerConnection, Error>,
}

/// Lets the two sides talk until neither has anything left to say.
pub(crate) fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Handshake {
    let name = ServerName::try_from("api.default").unwrap();
    let mut client = ClientConnection::new(client.clone(), name).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    let (mut client_error, mut server_error) = (None, None);
    loop {
        let mut moved = carry(&mut client, &mut server, &mut server_error);
        moved |= carry(&mut server, &mut client, &mut client_error);
        if !moved {
            break;
        }
    }
    Handshake { client: client_error.map_or(Ok(client), Err), server: server_error.map_or(Ok(server), Err) }
}

/// Moves what one side has to say to the other, and notes the first error that it causes there.
fn carry<A, B, S, T>(from: &mut A, to: &mut B, error: &mut Option<Error>) -> bool
where
    A: DerefMut<Target = ConnectionCommon<S>>,
    B: DerefMut<Target = ConnectionCommon<T>>,
    S: rustls::SideData,
    T: rustls::SideData,
{
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = bytes.as_slice();
    while error.is_none() && !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        *error = to.process_new_packets().err();
    }
    !bytes.is_empty()
}
