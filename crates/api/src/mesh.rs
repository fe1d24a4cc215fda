//! The Mesh service: commands of operators and sidecars, and questions about the mesh.

use futures_util::stream::BoxStream;
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};
use weft_identity::token::JoinToken;
use weft_model::membership::MembershipCommand;
use weft_model::rollout::{Evidence, RolloutCommand};
use weft_model::token::{JoinTokenCreated, TokenCommand};
use weft_model::version::ExpectedVersion;
use weft_model::{Command, ConfigVersion, InstanceId, Position, Scope};
use weft_proto::v1 as pb;
use weft_proto::v1::mesh_server;
use weft_routing::Projection;
use weft_routing::damping::counting::Taken;

use crate::Context;
use crate::caller::{Caller, Need};
use crate::commands::{self, Change, Commands, Outcome, fingerprint};
use crate::convert::{self, config_version};
use crate::flaps;
use crate::history;
use crate::log;
use crate::past::Past;
use crate::reads;
use crate::rollouts;
use crate::status::ApiError;

/// Longest life of a join token: a day covers any rollout that a person watches.
const TOKEN_TTL_SECONDS_MAX: u32 = 86_400;

/// Changes whose way into the sidecars a status shows.
const CHANGES_SHOWN: u32 = 5;

/// See the module's documentation.
pub struct Mesh {
    context: Context,
    commands: Commands,
    past: Arc<Past>,
}

impl Mesh {
    pub(crate) fn new(context: Context, commands: Commands, past: Arc<Past>) -> Self {
        Self { context, commands, past }
    }

    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, ApiError> {
        Caller::of(request.extensions(), (self.context.clock)())
    }

    /// Executes one change that `message` asks for.
    async fn one(
        &self,
        caller: &Caller,
        operation: &str,
        fingerprinted: &impl Message,
        meta: Option<pb::CommandMeta>,
        change: Change,
    ) -> Result<Response<pb::ApplyResponse>, ApiError> {
        let request = command(caller, operation, fingerprinted, meta, vec![change])?;
        let outcome = self.commands.execute(&request).await?;
        Ok(Response::new(applied(outcome)))
    }

    /// Answers from the mesh as of a moment.
    async fn look<R>(
        &self,
        at: Option<pb::At>,
        answer: impl FnOnce(&Projection) -> R + Send,
    ) -> Result<R, ApiError> {
        match self.past.position(convert::at(at)).await? {
            None => Ok(self.context.view.read(answer)),
            Some(position) => Ok(answer(&*self.past.projection(position).await?)),
        }
    }

    async fn apply(
        &self,
        request: Request<pb::ApplyRequest>,
    ) -> Result<Response<pb::ApplyResponse>, ApiError> {
        let caller = self.caller(&request)?;
        caller.require(Need::Change)?;
        let message = request.into_inner();
        let changes = convert::changes(message.changes.clone())?;
        let changes = match message.canary {
            Some(canary) => vec![convert::rollout(canary, changes)?],
            None => changes,
        };
        if message.dry_run {
            return Ok(Response::new(applied(self.commands.rehearse(&changes).await?)));
        }
        let request = command(&caller, "apply", &message, message.meta.clone(), changes)?;
        Ok(Response::new(applied(self.commands.execute(&request).await?)))
    }

    async fn membership(
        &self,
        caller: &Caller,
        operation: &str,
        fingerprinted: &impl Message,
        meta: Option<pb::CommandMeta>,
        expected: Option<pb::Expected>,
        command: Command,
    ) -> Result<Response<pb::ApplyResponse>, ApiError> {
        if let Command::Membership(instance, _) = &command {
            caller.require(Need::Membership(instance))?;
        }
        let change = Change::new(convert::expected(expected)?, command);
        self.one(caller, operation, fingerprinted, meta, change).await
    }

    async fn observe(
        &self,
        caller: &Caller,
        message: pb::ReportHealthRequest,
    ) -> Result<Response<pb::ApplyResponse>, ApiError> {
        let (instance, report) = convert::health_report(&message)?;
        caller.require(Need::Observe(&instance))?;
        let flaps = &self.context.flaps;
        let taken = flaps.take(&self.context, &instance, report);
        let command = match taken.map_err(|rejection| flaps::refused(&instance, rejection))? {
            Taken::Counted => return Ok(Response::new(self.nothing_changed(&instance))),
            Taken::Record(command) => command,
        };
        // The revision orders observations; the scope's version would only make a late one conflict twice.
        let change = Change::new(ExpectedVersion::Any, Command::Health(instance.clone(), command.clone()));
        let result = self.one(caller, "report_health", &message, message.meta.clone(), change).await;
        flaps.settle(&self.context.clock, &instance, &command, &result);
        result
    }

    fn nothing_changed(&self, instance: &InstanceId) -> pb::ApplyResponse {
        let scope = Scope::Health(instance.clone());
        self.context.view.read(|projection| pb::ApplyResponse {
            version: Some(config_version(projection.version())),
            outcomes: vec![pb::ScopeOutcome {
                version: projection.state().source(&scope).version.0,
                scope: scope.to_string(),
                changed: false,
            }],
            repeated: false,
        })
    }

    async fn create_token(
        &self,
        request: Request<pb::CreateJoinTokenRequest>,
    ) -> Result<Response<pb::CreateJoinTokenResponse>, ApiError> {
        let caller = self.caller(&request)?;
        caller.require(Need::CreateToken)?;
        let message = request.into_inner();
        if message.ttl_seconds == 0 || message.ttl_seconds > TOKEN_TTL_SECONDS_MAX {
            return Err(ApiError::invalid("ttl_seconds", format!("from 1 to {TOKEN_TTL_SECONDS_MAX}")));
        }
        let instance = match message.instance.as_str() {
            "" => None,
            text => Some(convert::name("instance", text)?),
        };
        let token = JoinToken::generate(self.context.authority.root_fingerprint())
            .map_err(|error| ApiError::Internal(error.to_string()))?;
        let ttl = Duration::from_secs(u64::from(message.ttl_seconds));
        let expires_at = (self.context.clock)().after(ttl);
        let created = JoinTokenCreated {
            secret_sha256: token.secret_sha256(),
            service: convert::service("service", &message.service)?,
            instance,
            expires_at,
        };
        let create = Command::Token(token.id().clone(), TokenCommand::Create(created));
        let change = Change::new(ExpectedVersion::Empty, create);
        let mut request =
            command(&caller, "create_join_token", &message, message.meta.clone(), vec![change])?;
        let outcome = self.commands.execute(&request).await?;
        if outcome.repeated {
            // The first answer was lost, and with it the only copy of the secret. Its token ends unused; this is another.
            request.command_id = uuid::Uuid::now_v7();
            self.commands.execute(&request).await?;
        }
        let token = token.reveal().to_string();
        Ok(Response::new(pb::CreateJoinTokenResponse { token, expires_at_ms: expires_at.0 }))
    }

    async fn end_rollout(
        &self,
        request: Request<pb::EndRolloutRequest>,
        operation: &str,
        end: impl FnOnce(Evidence) -> RolloutCommand + Send,
    ) -> Result<Response<pb::ApplyResponse>, ApiError> {
        let caller = self.caller(&request)?;
        caller.require(Need::Change)?;
        let message = request.into_inner();
        let (version, evidence) = rollouts::running(&self.context, Position(message.position)).await?;
        let change = Change::new(ExpectedVersion::exactly(version), Command::Rollout(end(evidence)));
        self.one(&caller, operation, &message, message.meta.clone(), change).await
    }

    async fn status_now(&self) -> Result<pb::StatusResponse, ApiError> {
        // The checkpoint before the rows that it stands for: whoever sees that it has come as far as his change sees the
        // sidecars' wanted versions with that change in them, and can wait for them to run it.
        let projected = async {
            let leader = self.context.store.leader().await?;
            let sidecars = self.context.store.sidecars().await?;
            Ok::<_, ApiError>((leader, sidecars, self.context.store.propagation(CHANGES_SHOWN).await?))
        };
        let reader = &self.context.reader;
        let (head, projected, rewinds) = tokio::join!(reader.head(), projected, reader.standing_rewinds());
        let (head, (leader, sidecars, changes), rewinds) = (head?, projected?, rewinds?);
        let head = ConfigVersion::new(head.epoch, head.position);
        let sidecars = sidecars.into_iter().map(reads::sidecar).collect();
        let now = (self.context.clock)();
        let status =
            self.context.view.read(|projection| reads::status(projection, head, &leader, sidecars, now));
        let rewinds = rewinds.into_iter().map(reads::rewind).collect();
        let propagation = changes.into_iter().map(reads::propagation).collect();
        Ok(pb::StatusResponse { rewinds, propagation, ..status })
    }

    async fn status(&self, request: Request<pb::StatusRequest>) -> Result<pb::StatusResponse, ApiError> {
        self.caller(&request)?.require(Need::Read)?;
        let Some(position) = self.past.position(convert::at(request.into_inner().at)).await? else {
            return self.status_now().await;
        };
        let projection = self.past.projection(position).await?;
        let (head, leader) = tokio::join!(self.context.reader.head(), self.context.store.leader());
        let head = head?;
        let head = ConfigVersion::new(head.epoch, head.position);
        let then = projection.state().at();
        Ok(reads::status(&projection, head, &leader?, reads::past_sidecars(&projection), then))
    }
}

fn command(
    caller: &Caller,
    operation: &str,
    fingerprinted: &impl Message,
    meta: Option<pb::CommandMeta>,
    changes: Vec<Change>,
) -> Result<commands::Request, ApiError> {
    let convert::Meta { command_id, reason } = convert::meta(meta)?;
    let actor = caller.actor();
    let fingerprint = fingerprint(operation, &actor, fingerprinted);
    Ok(commands::Request { command_id, reason, actor, fingerprint, changes })
}

fn applied(outcome: Outcome) -> pb::ApplyResponse {
    let scope = |scope: commands::ScopeOutcome| pb::ScopeOutcome {
        scope: scope.scope.to_string(),
        version: scope.version.0,
        changed: scope.changed,
    };
    pb::ApplyResponse {
        version: Some(config_version(outcome.version)),
        outcomes: outcome.scopes.into_iter().map(scope).collect(),
        repeated: outcome.repeated,
    }
}

#[tonic::async_trait]
impl mesh_server::Mesh for Mesh {
    async fn apply(&self, request: Request<pb::ApplyRequest>) -> Result<Response<pb::ApplyResponse>, Status> {
        Ok(Self::apply(self, request).await?)
    }

    async fn register_instance(
        &self,
        request: Request<pb::RegisterInstanceRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let pb::RegisterInstanceRequest { meta, expected, registration } = message.clone();
        let registration = registration.ok_or_else(|| ApiError::invalid("registration", "is missing"))?;
        let command = convert::register_instance(registration)?;
        Ok(self.membership(&caller, "register_instance", &message, meta, expected, command).await?)
    }

    async fn drain_instance(
        &self,
        request: Request<pb::DrainInstanceRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let pb::DrainInstanceRequest { meta, expected, instance } = message.clone();
        let instance: InstanceId = convert::name("instance", &instance)?;
        let command = Command::Membership(instance, MembershipCommand::Drain);
        Ok(self.membership(&caller, "drain_instance", &message, meta, expected, command).await?)
    }

    async fn deregister_instance(
        &self,
        request: Request<pb::DeregisterInstanceRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let pb::DeregisterInstanceRequest { meta, expected, instance } = message.clone();
        let instance: InstanceId = convert::name("instance", &instance)?;
        let command = Command::Membership(instance, MembershipCommand::Deregister);
        Ok(self.membership(&caller, "deregister_instance", &message, meta, expected, command).await?)
    }

    async fn add_upstream(
        &self,
        request: Request<pb::AddUpstreamRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        let pb::AddUpstreamRequest { meta, instance, service, port } = message.clone();
        let (instance, service) =
            (convert::name("instance", &instance)?, convert::name("service", &service)?);
        let wanted = MembershipCommand::AddUpstream { service, port: convert::port("port", port)? };
        let command = Command::Membership(instance, wanted);
        Ok(self.membership(&caller, "add_upstream", &message, meta, None, command).await?)
    }

    async fn put_traffic_policy(
        &self,
        request: Request<pb::PutTrafficPolicyRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        caller.require(Need::Change)?;
        let message = request.into_inner();
        let put = message.put.as_ref().ok_or_else(|| ApiError::invalid("put", "is missing"))?;
        let command = convert::put_traffic_policy(put)?;
        let change = Change::new(convert::expected(message.expected)?, command);
        Ok(self.one(&caller, "put_traffic_policy", &message, message.meta.clone(), change).await?)
    }

    async fn put_security_policy(
        &self,
        request: Request<pb::PutSecurityPolicyRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        caller.require(Need::Change)?;
        let message = request.into_inner();
        let put = message.put.clone().ok_or_else(|| ApiError::invalid("put", "is missing"))?;
        let command = convert::put_security_policy(put)?;
        let change = Change::new(convert::expected(message.expected)?, command);
        Ok(self.one(&caller, "put_security_policy", &message, message.meta.clone(), change).await?)
    }

    async fn advance_rollout(
        &self,
        request: Request<pb::EndRolloutRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        Ok(self.end_rollout(request, "advance_rollout", RolloutCommand::Advance).await?)
    }

    async fn abort_rollout(
        &self,
        request: Request<pb::EndRolloutRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let reason = request.get_ref().meta.as_ref().map(|meta| meta.reason.as_str()).unwrap_or_default();
        let reason = if reason.is_empty() { "an operator took it back" } else { reason }.to_owned();
        let abort = |evidence| RolloutCommand::Abort { reason, evidence };
        Ok(self.end_rollout(request, "abort_rollout", abort).await?)
    }

    async fn get_rollout(
        &self,
        request: Request<pb::GetRolloutRequest>,
    ) -> Result<Response<pb::GetRolloutResponse>, Status> {
        self.caller(&request)?.require(Need::Read)?;
        let canaries = rollouts::witnessed(&self.context).await?;
        let answer = self.context.view.read(|projection| reads::rollout(projection.state(), canaries));
        Ok(Response::new(answer))
    }

    async fn report_health(
        &self,
        request: Request<pb::ReportHealthRequest>,
    ) -> Result<Response<pb::ApplyResponse>, Status> {
        let caller = self.caller(&request)?;
        let message = request.into_inner();
        Ok(self.observe(&caller, message).await?)
    }

    async fn create_join_token(
        &self,
        request: Request<pb::CreateJoinTokenRequest>,
    ) -> Result<Response<pb::CreateJoinTokenResponse>, Status> {
        Ok(self.create_token(request).await?)
    }

    async fn get(&self, request: Request<pb::GetRequest>) -> Result<Response<pb::GetResponse>, Status> {
        self.caller(&request)?.require(Need::Read)?;
        let message = request.into_inner();
        let kind =
            pb::Kind::try_from(message.kind).map_err(|_| ApiError::invalid("kind", "is not known here"))?;
        let answer = self.look(message.at, |projection| reads::get(projection, kind, &message.name)).await?;
        Ok(Response::new(answer?))
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Ok(Response::new(Self::status(self, request).await?))
    }

    async fn why(&self, request: Request<pb::WhyRequest>) -> Result<Response<pb::WhyResponse>, Status> {
        self.caller(&request)?.require(Need::Read)?;
        let message = request.into_inner();
        let answer = self.look(message.at, |projection| reads::why(projection, &message)).await?;
        Ok(Response::new(answer?))
    }

    async fn adopt_history(
        &self,
        request: Request<pb::AdoptHistoryRequest>,
    ) -> Result<Response<pb::AdoptHistoryResponse>, Status> {
        let caller = self.caller(&request)?;
        caller.require(Need::Administer)?;
        Ok(Response::new(history::decide(&self.context, caller.actor(), request.into_inner()).await?))
    }

    type ReadLogStream = BoxStream<'static, Result<pb::LogBatch, Status>>;

    async fn read_log(
        &self,
        request: Request<pb::ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let caller = self.caller(&request)?;
        caller.require(Need::Read)?;
        let ends = caller.ends((self.context.clock)());
        let message = request.into_inner();
        let filter = log::Filter::new(&message)?;
        let to = self.past.position(convert::at(message.until)).await?;
        let drain = self.context.drain.clone();
        let reader = self.context.reader.clone();
        Ok(Response::new(log::read(reader, filter, &message, to, (drain, ends)).await?))
    }
}
