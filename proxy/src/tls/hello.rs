//! What a client says before it says who it is: whether it is a sidecar, and if it is none, which service it asks for by name (SNI) and
//! which protocols it offers (ALPN).
//!
//! rustls tells that to whoever chooses the certificate, and to nobody else on an unbuffered connection. So [`Listening`] chooses the
//! certificate, and leaves what it heard where the very call of rustls returns to: [`take`] is called on the same thread right behind it.
//! Called by [`super::handshake`].

use crate::tunnel::ALPN;
use std::cell::RefCell;
use std::sync::Arc;
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use weft_model::{DnsName, ServiceName};

thread_local! {
    static HEARD: RefCell<Option<Hello>> = const { RefCell::new(None) };
}

/// What a client that is no sidecar asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// What it asks for; or why it is refused.
    pub(crate) wanted: Result<DnsName, String>,
    pub(crate) offered: Offered,
}

/// What a client that is no sidecar would speak inside TLS. The sidecar does not know what its app speaks, so it agrees only where there is
/// nothing to choose; to a client that offers several it is a server that knows none, and such clients go on with what they would speak without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    /// It does not say.
    Nothing,
    One(Vec<u8>),
    Several,
}

impl Offered {
    /// What the server's configuration is to have, so that rustls agrees to it.
    pub(crate) fn agreed(self) -> Vec<Vec<u8>> {
        match self {
            Self::One(protocol) => vec![protocol],
            Self::Nothing | Self::Several => Vec::new(),
        }
    }
}

/// What was heard on this thread since this was last called.
pub(crate) fn take() -> Option<Hello> {
    HEARD.take()
}

/// Chooses the certificate: there is one. It is not shown to those who ask for another service; nor yet to those who offer protocols, for rustls would
/// refuse all that are not in the configuration: they need another one.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) certificates: Arc<dyn ResolvesServerCert>,
    pub(crate) own: ServiceName,
}

impl ResolvesServerCert for Listening {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let heard = hear(&self.own, hello.server_name(), hello.alpn());
        let shown =
            heard.as_ref().is_none_or(|heard| heard.wanted.is_ok() && heard.offered == Offered::Nothing);
        HEARD.set(heard);
        if shown { self.certificates.resolve(hello) } else { None }
    }
}

/// What a hello says; none if a sidecar says it.
fn hear<'h>(
    own: &ServiceName,
    name: Option<&str>,
    protocols: Option<impl Iterator<Item = &'h [u8]>>,
) -> Option<Hello> {
    let mut offered = Offered::Nothing;
    for protocol in protocols.into_iter().flatten() {
        if protocol == ALPN {
            return None;
        }
        offered = match offered {
            Offered::Nothing => Offered::One(protocol.to_vec()),
            Offered::One(_) | Offered::Several => Offered::Several,
        };
    }
    Some(Hello { wanted: wanted(own, name), offered })
}

fn wanted(own: &ServiceName, name: Option<&str>) -> Result<DnsName, String> {
    let expected = || DnsName::of(own.clone());
    let Some(name) = name else {
        return Err(format!(
            "a client that is no sidecar names no service; it would be {} by SNI",
            expected()
        ));
    };
    match name.parse::<DnsName>() {
        Ok(name) if name.service == *own => Ok(name),
        Ok(_) | Err(_) => {
            Err(format!("a client that is no sidecar asks for {name:?}, and this is {}", expected()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(name: Option<&str>, protocols: Option<&[&[u8]]>) -> Option<Hello> {
        hear(&"default/db".parse().unwrap(), name, protocols.map(|list| list.iter().copied()))
    }

    #[test]
    fn a_sidecar_is_one_whatever_it_names() {
        assert_eq!(heard(Some("db.default"), Some(&[ALPN])), None);
        assert_eq!(heard(None, Some(&[b"h2", ALPN])), None);
    }

    #[test]
    fn others_have_to_name_this_service() {
        let offered = |protocols| heard(Some("db.default.weft"), protocols).unwrap();
        assert_eq!(offered(None).wanted, Ok("db.default.weft".parse().unwrap()));
        assert_eq!(offered(None).offered, Offered::Nothing);
        assert_eq!(offered(Some(&[])).offered, Offered::Nothing);
        assert_eq!(offered(Some(&[b"postgresql"])).offered, Offered::One(b"postgresql".to_vec()));
        assert_eq!(offered(Some(&[b"h2", b"http/1.1"])).offered, Offered::Several);
        assert!(heard(Some("SQL.db.default.weft"), None).unwrap().wanted.is_ok());
        for name in
            [None, Some("db.default"), Some("web.default.weft"), Some("db.other.weft"), Some("localhost")]
        {
            let refused = heard(name, None).unwrap().wanted.unwrap_err();
            assert!(refused.contains("db.default.weft"), "{refused}");
        }
    }

    #[test]
    fn what_is_agreed_is_what_there_is_no_choice_in() {
        assert_eq!(Offered::Nothing.agreed(), Vec::<Vec<u8>>::new());
        assert_eq!(Offered::Several.agreed(), Vec::<Vec<u8>>::new());
        assert_eq!(Offered::One(b"h2".to_vec()).agreed(), [b"h2".to_vec()]);
    }
}
