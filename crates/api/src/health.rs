//! gRPC health: serving for as long as the log can be followed. Open to everybody, so that load balancers can ask.

use futures_util::Stream;
use futures_util::stream;
use std::pin::Pin;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use weft_projector::View;

pub(crate) fn service(view: View) -> HealthServer<FoldHealth> {
    HealthServer::new(FoldHealth { view })
}

pub(crate) struct FoldHealth {
    view: View,
}

impl FoldHealth {
    fn current(&self) -> HealthCheckResponse {
        let status =
            if self.view.fault().is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
        HealthCheckResponse { status: status.into() }
    }
}

#[tonic::async_trait]
impl Health for FoldHealth {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(self.current()))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// One answer and the end: whoever wants to know again asks again, so that nobody without an identity can hold a
    /// stream open.
    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let current = self.current();
        Ok(Response::new(Box::pin(stream::once(async move { Ok(current) }))))
    }
}
