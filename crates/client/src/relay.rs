//! One connection for many sidecars, as a relay on a node has it. The connection has a leaf of its own; who else speaks on it
//! proves with its own key that it wants to ([`weft_identity::introduction`]), and a controller treats its calls as if
//! they came on a connection of their own. So a relay sees nothing and does nothing that its sidecars did not ask for.

use crate::address::ControllerAddress;
use crate::channel::{Connector, Tls, Way, endpoint};
use crate::error::CallError;
use hyper_util::rt::TokioIo;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};
use tower::service_fn;
use weft_identity::credential::Credential;
use weft_identity::introduction::{self, AS, Binding};
use weft_proto::v1::IntroduceRequest;
use weft_proto::v1::identity_client::IdentityClient;

/// What the controller may send ahead on the connection: a notice for each of a thousand sidecars, and room for pulls.
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// See the module's documentation. Not opened again when it breaks: every sidecar has to be introduced anew then.
#[derive(Clone, Debug)]
pub struct Relay {
    channel: Channel,
    binding: Binding,
}

/// The connection, in the name of one sidecar.
pub type Introduced = InterceptedService<Channel, SpeakAs>;

/// Says of every call whose it is, if it is not of the connection's own leaf.
#[derive(Clone, Debug)]
pub struct SpeakAs(Option<MetadataValue<Ascii>>);

impl Interceptor for SpeakAs {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(number) = &self.0 {
            request.metadata_mut().insert(AS, number.clone());
        }
        Ok(request)
    }
}

impl Relay {
    /// Connects to the first of `controllers` that answers; `tls` as for [`channel`](crate::channel).
    ///
    /// # Errors
    /// None answers, or none takes the leaf.
    pub async fn connect(
        controllers: Vec<ControllerAddress>,
        tls: impl Into<Tls>,
    ) -> Result<Self, CallError> {
        Self::connect_through(controllers, tls, Way::default(), |stream| stream).await
    }

    /// As [`connect`](Self::connect), in a way of its own, and with the connection's bytes going through what `through` makes of it.
    ///
    /// # Errors
    /// As there.
    pub async fn connect_through<S>(
        controllers: Vec<ControllerAddress>,
        tls: impl Into<Tls>,
        way: Way,
        through: impl Fn(TcpStream) -> S,
    ) -> Result<Self, CallError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let unreachable = |error: &dyn std::fmt::Display| CallError::Unreachable(error.to_string());
        let connected = Connector::new(controllers, tls.into()).connect(way, through).await;
        let stream = connected.map_err(|error| unreachable(&error))?;
        let binding = introduction::binding(stream.get_ref().1).map_err(|error| unreachable(&error))?;
        let mut stream = Some(TokioIo::new(stream));
        let once = service_fn(move |_| {
            let stream = stream.take();
            async { stream.ok_or_else(|| io::Error::other("the relay's connection ended")) }
        });
        let endpoint = endpoint(way).initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let channel = endpoint.connect_with_connector(once).await;
        Ok(Self { channel: channel.map_err(|error| unreachable(&error))?, binding })
    }

    /// The connection itself, in the name of its own leaf.
    #[must_use]
    pub fn own(&self) -> Introduced {
        InterceptedService::new(self.channel.clone(), SpeakAs(None))
    }

    /// Introduces the holder of a credential.
    ///
    /// # Errors
    /// The controller does not take it, or has enough of them on this connection.
    pub async fn introduce(&self, credential: &Credential) -> Result<Introduced, CallError> {
        let proof = introduction::prove(credential, &self.binding);
        let unsigned = |error: rustls::Error| CallError::Invalid { change: None, message: error.to_string() };
        let proof = proof.map_err(unsigned)?.into();
        let leaf = credential.leaf().to_vec().into();
        let mut identity = IdentityClient::new(self.channel.clone());
        let number = identity.introduce(IntroduceRequest { leaf, proof }).await?.into_inner().number;
        Ok(InterceptedService::new(self.channel.clone(), SpeakAs(Some(number.into()))))
    }
}
