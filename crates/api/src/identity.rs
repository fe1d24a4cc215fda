//! The Identity service: the first leaf for a join token, and a new leaf before the old one ends.
//!
//! A leaf is recorded before it is handed out, and with a join in the same append that uses the token up: so of any
//! number of joins with one token, one gets a leaf, and every leaf that somebody holds is in the log. Only the public
//! key is taken from a signing request; the names are the token's or the caller's.
//!
//! **A join whose answer was lost** is repeated with the same command id, token and key. The log answers that the
//! command was executed, but the leaf of then was not kept. Whoever holds the token's secret and the private key may
//! have it: a new leaf for the same key is issued and recorded. Another key, or another id, finds the token used.
//!
//! **Who slept through the end of its leaf** (a machine that was off, a control plane that was away) comes without a
//! certificate, shows the ended leaf inside the request and proves by the request's signature that it has the key. For
//! some days that is enough; after that it joins anew.
//!
//! **A renewal looks at the identity and not at the membership.** An instance that was deregistered, by an operator or by
//! its own sidecar's orderly end, is out of every snapshot and gets no traffic, and may renew: the sidecar that ended
//! must be able to come back. So deregistering somebody does not take its identity away. That is revocation, which is
//! an event of its own and does not exist yet; until then, whoever holds an instance's key can renew its leaf.

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};
use uuid::Uuid;
use weft_identity::ca::{IssuedLeaf, LEAF_LIFETIME};
use weft_identity::public_key::PublicKey;
use weft_identity::spiffe::{SpiffeId, Subject};
use weft_identity::token::JoinToken;
use weft_model::identity::LeafIssued;
use weft_model::token::TokenCommand;
use weft_model::version::ExpectedVersion;
use weft_model::{Chain, Command, InstanceId};
use weft_proto::v1 as pb;
use weft_proto::v1::identity_server;

use crate::Context;
use crate::caller::{Caller, Peer};
use crate::commands::{self, Change, Commands};
use crate::convert;
use crate::joins::FailedJoins;
use crate::status::ApiError;

/// See the module's documentation.
pub struct Identity {
    context: Context,
    commands: Commands,
    failed: FailedJoins,
}

impl Identity {
    pub(crate) fn new(context: Context, commands: Commands) -> Self {
        Self { context, commands, failed: FailedJoins::new() }
    }

    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<pb::LeafResponse, ApiError> {
        let network = request.extensions().get::<Peer>().map(Peer::network);
        let network = network.ok_or_else(|| ApiError::Internal("a request without a peer".into()))?;
        if let Err(wait) = self.failed.admit(network) {
            let retry_after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1);
            return Err(ApiError::Overloaded { retry_after_ms });
        }
        let result = self.redeem(request.into_inner()).await;
        let outcome = result.as_ref().map_or_else(ApiError::as_str, |_| "joined");
        metrics::counter!("weft_api_joins_total", "outcome" => outcome).increment(1);
        if matches!(result, Err(ApiError::Rejected { .. } | ApiError::Invalid { .. })) {
            self.failed.count(network);
        }
        result
    }

    async fn redeem(&self, request: pb::JoinRequest) -> Result<pb::LeafResponse, ApiError> {
        let convert::Meta { command_id, reason } = convert::meta(request.meta)?;
        let token: JoinToken = convert::name("token", &request.token)?;
        let instance: InstanceId = convert::name("instance", &request.instance)?;
        if token.root() != self.context.authority.root_fingerprint() {
            return Err(ApiError::invalid("token", "is for another mesh, or its root was replaced"));
        }
        let key = public_key(&request.csr)?;
        let secret_sha256 = token.secret_sha256();
        let redeem = Change::new(
            ExpectedVersion::Any,
            Command::Token(
                token.id().clone(),
                TokenCommand::Redeem { secret_sha256: secret_sha256.clone(), instance: instance.clone() },
            ),
        );
        let leaf = self.issue(&instance, &key)?;
        let actor = self.spiffe_id(&instance).to_string();
        let fingerprint = join_fingerprint(&secret_sha256, &instance, &key);
        let changes = vec![redeem, record(&instance, &leaf)];
        let command = commands::Request {
            command_id,
            reason: reason.clone(),
            actor: actor.clone(),
            fingerprint,
            changes,
        };
        if !self.commands.execute(&command).await?.repeated {
            tracing::info!(%instance, token = %token.id(), serial = %leaf.identity.serial, "joined");
            return Ok(self.answer(&leaf));
        }
        tracing::info!(%instance, token = %token.id(), serial = %leaf.identity.serial, "joined again: its first answer was lost");
        self.record_and_answer(&instance, &leaf, actor, reason).await
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<pb::LeafResponse, ApiError> {
        let caller = Caller::of(request.extensions(), (self.context.clock)());
        let pb::RenewRequest { meta, csr, ended_leaf } = request.into_inner();
        let (instance, key) = match caller {
            Err(ApiError::Unauthenticated(_)) if !ended_leaf.is_empty() => {
                self.latecomer(&ended_leaf, &csr)?
            }
            caller => (caller?.sidecar()?.clone(), public_key(&csr)?),
        };
        let convert::Meta { reason, .. } = convert::meta(meta)?;
        let leaf = self.issue(&instance, &key)?;
        metrics::counter!("weft_api_renewals_total").increment(1);
        let actor = self.spiffe_id(&instance).to_string();
        self.record_and_answer(&instance, &leaf, actor, reason).await
    }

    /// Whose leaf ended, if it is one that this mesh issued and the request is by the holder of its key.
    fn latecomer(&self, ended_leaf: &[u8], csr: &[u8]) -> Result<(InstanceId, PublicKey), ApiError> {
        let key = public_key(csr)?;
        let leaf = CertificateDer::from(ended_leaf);
        let recognized = self.context.authority.recognize_expired(&leaf, &key, (self.context.clock)());
        let identity = recognized.map_err(|error| {
            metrics::counter!("weft_api_refused_total", "reason" => "ended_leaf").increment(1);
            tracing::warn!(error = %Chain(&error), "an ended leaf was not taken");
            ApiError::Unauthenticated(format!("the ended leaf is not taken: {}", Chain(&error)))
        })?;
        let instance = identity.id.as_instance().cloned();
        let instance = instance.ok_or_else(|| ApiError::Denied("only an instance may do this".into()))?;
        let known = self.context.view.read(|mesh| mesh.state().identity(&instance).is_some());
        if known {
            Ok((instance, key))
        } else {
            Err(ApiError::Unauthenticated(format!("no leaf of {instance} is in the log; join with a token")))
        }
    }

    /// Every leaf is a command of its own: a repeat whose first answer was lost gets, and records, another leaf.
    async fn record_and_answer(
        &self,
        instance: &InstanceId,
        leaf: &IssuedLeaf,
        actor: String,
        reason: Option<String>,
    ) -> Result<pb::LeafResponse, ApiError> {
        let command_id = Uuid::now_v7();
        let fingerprint = Sha256::digest(leaf.certificate.as_ref()).into();
        let changes = vec![record(instance, leaf)];
        self.commands.execute(&commands::Request { command_id, reason, actor, fingerprint, changes }).await?;
        Ok(self.answer(leaf))
    }

    fn introduce(&self, request: &Request<pb::IntroduceRequest>) -> Result<pb::IntroduceResponse, ApiError> {
        let now = (self.context.clock)();
        Caller::of(request.extensions(), now)?;
        let peer = request.extensions().get::<Peer>();
        let peer = peer.ok_or_else(|| ApiError::Internal("a request without a peer".into()))?;
        let pb::IntroduceRequest { leaf, proof } = request.get_ref();
        let leaf = CertificateDer::from(&leaf[..]);
        let recognized = self.context.authority.recognize_introduced(&leaf, proof, &peer.binding, now);
        let identity = recognized.map_err(|error| {
            metrics::counter!("weft_api_refused_total", "reason" => "introduction").increment(1);
            tracing::warn!(address = %peer.address, error = %Chain(&error), "an introduction was not taken");
            ApiError::Unauthenticated(format!("the introduction is not taken: {}", Chain(&error)))
        })?;
        Ok(pb::IntroduceResponse { number: peer.introduced.add(identity)? })
    }

    fn issue(&self, instance: &InstanceId, key: &PublicKey) -> Result<IssuedLeaf, ApiError> {
        let subject = Subject::Instance(instance.clone());
        let now = (self.context.clock)();
        let issued = self.context.authority.issue_leaf(&subject, key, now, LEAF_LIFETIME);
        issued.map_err(|error| ApiError::Internal(Chain(&error).to_string()))
    }

    fn spiffe_id(&self, instance: &InstanceId) -> SpiffeId {
        let trust_domain = self.context.authority.trust_domain().clone();
        SpiffeId { trust_domain, subject: Subject::Instance(instance.clone()) }
    }

    fn answer(&self, leaf: &IssuedLeaf) -> pb::LeafResponse {
        let pems: Vec<String> = self.context.view.read(|projection| {
            projection.state().ca().state.iter().map(|root| root.certificate_pem.clone()).collect()
        });
        let own = self.context.authority.root();
        let mut roots = vec![own.clone().into_owned()];
        for pem in &pems {
            match CertificateDer::from_pem_slice(pem.as_bytes()) {
                Ok(root) if root != *own => roots.push(root),
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "a trusted root in the log is not PEM; it is left out"),
            }
        }
        pb::LeafResponse {
            chain: vec![leaf.certificate.to_vec().into()],
            roots: roots.iter().map(|root| root.to_vec().into()).collect(),
            not_after_ms: leaf.identity.not_after.0,
        }
    }
}

fn public_key(csr: &[u8]) -> Result<PublicKey, ApiError> {
    PublicKey::from_csr(csr).map_err(|error| ApiError::invalid("csr", error))
}

/// The event that an issued leaf is.
fn record(instance: &InstanceId, leaf: &IssuedLeaf) -> Change {
    let issued = LeafIssued {
        serial: leaf.identity.serial.clone(),
        public_key_sha256: leaf.identity.public_key_sha256.to_string(),
        not_before: leaf.identity.not_before,
        not_after: leaf.identity.not_after,
    };
    Change::new(ExpectedVersion::Any, Command::Identity(instance.clone(), issued))
}

/// What makes a repeated join the same one: the token's secret, who joins, and with which key.
fn join_fingerprint(secret_sha256: &str, instance: &InstanceId, key: &PublicKey) -> [u8; 32] {
    let text = format!("join\n{secret_sha256}\n{instance}\n{}", key.fingerprint());
    Sha256::digest(text.as_bytes()).into()
}

#[tonic::async_trait]
impl identity_server::Identity for Identity {
    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::LeafResponse>, Status> {
        Ok(Response::new(Self::join(self, request).await?))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::LeafResponse>, Status> {
        Ok(Response::new(Self::renew(self, request).await?))
    }

    async fn introduce(
        &self,
        request: Request<pb::IntroduceRequest>,
    ) -> Result<Response<pb::IntroduceResponse>, Status> {
        Ok(Response::new(Self::introduce(self, &request)?))
    }
}
