//! Errors to gRPC codes: the only place that knows codes.
//!
//! A refused command carries an [`ErrorDetail`](weft_proto::v1::ErrorDetail) in the status details, so that callers
//! need not read the message: the current version of a conflict, the field of a rejection, and which change of a batch
//! it is about.

use prost::Message;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use weft_eventlog::{AppendError, StoreError};
use weft_model::version::{ExpectedVersion, Version};
use weft_model::{Chain, Rejection, Scope};
use weft_projector::{Fault, FoldToError};
use weft_proto::v1::error_detail::Detail;
use weft_proto::v1::{Conflict, ErrorDetail, Rejected};

/// The header that tells a caller when to come back, in milliseconds (gRPC A6).
const RETRY_HEADER: &str = "grpc-retry-pushback-ms";

/// Why a call fails. The message says what to do next.
#[derive(Debug)]
pub enum ApiError {
    /// The request makes no sense.
    Invalid {
        /// Which change of a batch, counted from 0.
        change: Option<u32>,
        /// The field and the rule that it breaks.
        message: String,
    },
    /// A rule of the mesh refuses the command.
    Rejected {
        /// Which change of a batch, counted from 0.
        change: Option<u32>,
        /// The scope that it is about.
        scope: Scope,
        /// The rule.
        rejection: Box<Rejection>,
    },
    /// A scope is not at the version that the caller expected.
    Conflict {
        /// Which change of a batch, counted from 0.
        change: Option<u32>,
        /// The scope.
        scope: Scope,
        /// What was expected.
        expected: ExpectedVersion,
        /// Where it is.
        current: Version,
    },
    /// What was asked for is not there.
    NotFound(String),
    /// The caller showed no certificate, or one that has ended.
    Unauthenticated(String),
    /// The caller may not do this.
    Denied(String),
    /// Too much to do.
    Overloaded {
        /// When to come back, in milliseconds.
        retry_after_ms: u64,
    },
    /// The store, or this controller's state, is not there now.
    Unavailable(String),
    /// The log lost events that were seen, or a decision about that comes too late.
    Rewound(String),
    /// Stored data cannot be read, or was lost.
    DataLoss(String),
    /// A fault of this program.
    Internal(String),
}

impl ApiError {
    /// The request makes no sense.
    pub fn invalid(field: &str, rule: impl std::fmt::Display) -> Self {
        Self::Invalid { change: None, message: format!("{field}: {rule}") }
    }

    /// The same error, about this change of a batch.
    #[must_use]
    pub fn at_change(mut self, index: usize) -> Self {
        match &mut self {
            Self::Invalid { change, .. } | Self::Rejected { change, .. } | Self::Conflict { change, .. } => {
                *change = u32::try_from(index).ok();
            }
            Self::NotFound(_)
            | Self::Unauthenticated(_)
            | Self::Denied(_)
            | Self::Overloaded { .. }
            | Self::Unavailable(_)
            | Self::Rewound(_)
            | Self::DataLoss(_)
            | Self::Internal(_) => {}
        }
        self
    }

    /// One word for metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid",
            Self::Rejected { .. } => "rejected",
            Self::Conflict { .. } => "conflict",
            Self::NotFound(_) => "not_found",
            Self::Unauthenticated(_) => "unauthenticated",
            Self::Denied(_) => "denied",
            Self::Overloaded { .. } => "overloaded",
            Self::Unavailable(_) => "unavailable",
            Self::Rewound(_) => "log_rewound",
            Self::DataLoss(_) => "data_loss",
            Self::Internal(_) => "internal",
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Invalid { change, message } => detailed(Code::InvalidArgument, message, change, None),
            ApiError::Rejected { change, scope, rejection } => {
                let message = rejection.to_string();
                detailed(Code::FailedPrecondition, message, change, Some(rejected(&scope, &rejection)))
            }
            ApiError::Conflict { change, scope, expected, current } => {
                let message =
                    format!("{scope} is at version {current}, not {expected}; read it again and decide anew");
                let conflict = Conflict {
                    scope: scope.to_string(),
                    expected: expected.to_string(),
                    current_version: current.0,
                };
                detailed(Code::Aborted, message, change, Some(Detail::Conflict(conflict)))
            }
            ApiError::NotFound(message) => Self::not_found(message),
            ApiError::Unauthenticated(message) => Self::unauthenticated(message),
            ApiError::Denied(message) => Self::permission_denied(message),
            ApiError::Overloaded { retry_after_ms } => overloaded(retry_after_ms),
            ApiError::Unavailable(message) => Self::unavailable(message),
            ApiError::Rewound(message) => Self::failed_precondition(message),
            ApiError::DataLoss(message) => Self::data_loss(message),
            ApiError::Internal(message) => Self::internal(message),
        }
    }
}

fn detailed(code: Code, message: String, change: Option<u32>, detail: Option<Detail>) -> Status {
    if change.is_none() && detail.is_none() {
        return Status::new(code, message);
    }
    Status::with_details(code, message, ErrorDetail { change, detail }.encode_to_vec().into())
}

fn rejected(scope: &Scope, rejection: &Rejection) -> Detail {
    let mut detail = Rejected { scope: scope.to_string(), ..Rejected::default() };
    match rejection {
        Rejection::Invalid { field, .. } => detail.field.clone_from(field),
        Rejection::StaleObservation { current } => detail.current_revision = *current,
        Rejection::NotAdmitted { by, .. } => detail.rule.clone_from(by),
        Rejection::Absent(_)
        | Rejection::UnknownService(_)
        | Rejection::ServiceInUse { .. }
        | Rejection::AddressTaken { .. }
        | Rejection::Gone(_)
        | Rejection::TokenUnknown
        | Rejection::TokenUsed { .. }
        | Rejection::TokenExpired { .. }
        | Rejection::TokenElsewhere { .. }
        | Rejection::Candidate { .. }
        | Rejection::RolloutRunning
        | Rejection::NoRollout
        | Rejection::InRollout(_)
        | Rejection::NoCanary(_) => {}
    }
    Detail::Rejected(detail)
}

fn overloaded(retry_after_ms: u64) -> Status {
    let mut status = Status::resource_exhausted(format!("try again in {retry_after_ms} ms"));
    status.metadata_mut().insert(RETRY_HEADER, MetadataValue::from(retry_after_ms));
    status
}

/// An append that failed for another reason than a conflict, which the caller decides about.
impl From<AppendError> for ApiError {
    fn from(error: AppendError) -> Self {
        let chain = Chain(&error).to_string();
        match error {
            AppendError::CommandIdReused => Self::invalid(
                "meta.command_id",
                "was already used for another command; make a new one for a new command",
            ),
            AppendError::CommandIdExpired => Self::invalid(
                "meta.command_id",
                "is older than 72 hours, so whether it was executed is not known any more; look with `weft log`, \
                 and make a new one for a new command",
            ),
            AppendError::TooLarge(_) | AppendError::Malformed(_) => {
                Self::Invalid { change: None, message: chain }
            }
            AppendError::Overloaded { retry_after_ms } => Self::Overloaded { retry_after_ms },
            AppendError::Rewound { .. } => Self::Rewound(format!(
                "{chain}; look with `weft status`, and go on with `weft log adopt-history`"
            )),
            AppendError::Store(source) => source.into(),
            AppendError::Closed => Self::Unavailable("this controller is shutting down".into()),
            // A conflict is decided again before it gets here; a variant to come is at least not hidden.
            _ => Self::Internal(chain),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let chain = Chain(&error).to_string();
        match error {
            StoreError::Connect(_)
            | StoreError::Statement { .. }
            | StoreError::Role { .. }
            | StoreError::Unfit(_)
            | StoreError::NotMigrated
            | StoreError::Unanswered => Self::Unavailable(chain),
            StoreError::Rewound { .. } => Self::Rewound(chain),
            // What is stored is at fault, not whether it can be reached.
            _ => Self::DataLoss(chain),
        }
    }
}

impl From<weft_projector::StoreError> for ApiError {
    fn from(error: weft_projector::StoreError) -> Self {
        let chain = Chain(&error).to_string();
        match error {
            weft_projector::StoreError::Row { .. } => Self::DataLoss(chain),
            weft_projector::StoreError::Database { .. }
            | weft_projector::StoreError::Log(_)
            | weft_projector::StoreError::Url(_) => Self::Unavailable(chain),
        }
    }
}

impl From<&Fault> for ApiError {
    fn from(fault: &Fault) -> Self {
        let message = format!("this controller stopped following the log: {}", Chain(fault));
        match fault {
            Fault::History(StoreError::Rewound { .. }) | Fault::Rewound { .. } => Self::Rewound(message),
            _ => Self::DataLoss(message),
        }
    }
}

impl From<FoldToError> for ApiError {
    fn from(error: FoldToError) -> Self {
        match error {
            FoldToError::Store(source) => source.into(),
            FoldToError::Fault(fault) => Self::from(&fault),
            FoldToError::NotYet { .. } => Self::NotFound(error.to_string()),
        }
    }
}
