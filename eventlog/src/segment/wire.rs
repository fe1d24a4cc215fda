//! A segment's body before it is compressed.
//!
//! A protobuf message, so that its format is written down in a language that others can read. Numbers of events are those
//! of the whole segment unless said otherwise. The format is for ever: another one would be another message.

/// Events in columns.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Columns {
    /// Position of the first event; the others follow without a gap.
    #[prost(uint64, tag = "1")]
    pub(super) first_position: u64,
    /// How many events there are.
    #[prost(uint32, tag = "2")]
    pub(super) events: u32,
    /// Epochs in their order,
    #[prost(uint64, repeated, tag = "3")]
    pub(super) epochs: Vec<u64>,
    /// and how many events each has.
    #[prost(uint32, repeated, tag = "4")]
    pub(super) epoch_events: Vec<u32>,
    /// Scopes, in the order of their first event here,
    #[prost(string, repeated, tag = "5")]
    pub(super) scopes: Vec<String>,
    /// the version of that event; the scope's later ones here count on from it,
    #[prost(uint64, repeated, tag = "6")]
    pub(super) scope_versions: Vec<u64>,
    /// and of each event, which scope.
    #[prost(uint32, repeated, tag = "7")]
    pub(super) scope: Vec<u32>,
    /// Types,
    #[prost(string, repeated, tag = "8")]
    pub(super) types: Vec<String>,
    /// the schema version of each (a type of two schemas is listed twice),
    #[prost(uint32, repeated, tag = "9")]
    pub(super) schemas: Vec<u32>,
    /// and of each event, which type.
    #[prost(uint32, repeated, tag = "10")]
    pub(super) r#type: Vec<u32>,
    /// Actors,
    #[prost(string, repeated, tag = "11")]
    pub(super) actors: Vec<String>,
    /// and of each event, which one.
    #[prost(uint32, repeated, tag = "12")]
    pub(super) actor: Vec<u32>,
    /// Reasons,
    #[prost(string, repeated, tag = "13")]
    pub(super) reasons: Vec<String>,
    /// and of each event, which one, counted from one; zero for none.
    #[prost(uint32, repeated, tag = "14")]
    pub(super) reason: Vec<u32>,
    /// Of each event, how many positions back its cause is; zero for none.
    #[prost(uint64, repeated, tag = "15")]
    pub(super) cause: Vec<u64>,
    /// Ids of commands, in their order: the first byte of each, then the second of each, to the sixteenth;
    #[prost(bytes = "vec", tag = "16")]
    pub(super) command_ids: Vec<u8>,
    /// and how many events each has here.
    #[prost(uint32, repeated, tag = "17")]
    pub(super) command_events: Vec<u32>,
    /// When the first event was recorded, in microseconds since the Unix epoch,
    #[prost(sint64, tag = "18")]
    pub(super) first_recorded_at: i64,
    /// and of each event, how much later than the one before.
    #[prost(uint64, repeated, tag = "19")]
    pub(super) recorded_at: Vec<u64>,
    /// Bytes of each event's payload,
    #[prost(uint32, repeated, tag = "20")]
    pub(super) payload_bytes: Vec<u32>,
    /// and the payloads, one after the other.
    #[prost(string, tag = "21")]
    pub(super) payloads: String,
}
