//! Errors as the API tells them: RFC 9457 problem details with a stable code, a JSON pointer and a remedy.
//!
//! Every error answer of the server is `application/problem+json` with this body. [`Code`] is the one table of what
//! can go wrong; a code never changes its meaning, and its HTTP status follows from it.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// The media type of a [`Problem`] (RFC 9457 §3).
pub const MEDIA_TYPE: &str = "application/problem+json";

/// What `type` starts with; the code follows.
const TYPE_PREFIX: &str = "urn:rackvisor:problem:";

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $status:literal, $title:literal;)+) => {
        /// What went wrong, as a program tells it apart. Each has one HTTP status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $($(#[doc = $doc])+ #[doc = concat!("\n\nHTTP ", $status, ", code `", $text, "`.")] $name,)+
            /// A code that this build does not know (a client talking to a newer server): see [`Problem::kind`].
            Other,
        }

        impl Code {
            /// All codes that the server of this build can answer, in the order of the table.
            pub const ALL: &[Code] = &[$(Code::$name,)+];

            /// The stable kebab-case text of the code.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text,)+ Code::Other => "other" }
            }

            /// The HTTP status that goes with the code.
            pub const fn status(self) -> u16 {
                match self { $(Code::$name => $status,)+ Code::Other => 500 }
            }

            /// A short summary that is the same for every occurrence (RFC 9457 §3.1.3).
            pub const fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)+ Code::Other => "Unknown problem" }
            }
        }
    };
}

codes! {
    /// The HTTP request itself is malformed.
    BadRequest = "bad-request", 400, "Malformed request";
    /// The body is not JSON (or the file is not JSON or TOML).
    MalformedBody = "malformed-body", 400, "The document cannot be parsed";
    /// A body came with a request that takes none.
    UnexpectedBody = "unexpected-body", 400, "This request takes no body";
    /// Descriptors came that the request takes none of, or others than it asks for, or too many.
    BadDescriptors = "bad-descriptors", 400, "The descriptors cannot be taken";
    /// This client is not one of those that the server was told to serve.
    NotAllowed = "not-allowed", 403, "Not allowed";
    /// No such path below `/v1`.
    NoSuchPath = "no-such-path", 404, "No such path";
    /// No VM is defined in this process.
    VmUndefined = "vm-undefined", 404, "No VM is defined";
    /// The VM has no disk with this id.
    NoSuchDisk = "no-such-disk", 404, "No such disk";
    /// The VM has no group of disks with this id.
    NoSuchDiskGroup = "no-such-disk-group", 404, "No such group of disks";
    /// The VM has no NIC with this id.
    NoSuchNic = "no-such-nic", 404, "No such NIC";
    /// The VM has no such part to look at.
    NoSuchPart = "no-such-part", 404, "No such part";
    /// The path exists, the method does not apply to it; `Allow` lists those that do.
    MethodNotAllowed = "method-not-allowed", 405, "Method not allowed";
    /// The client was too slow to send its request.
    RequestTimeout = "request-timeout", 408, "The request took too long to arrive";
    /// The VM is in a state in which the request is not legal.
    WrongState = "wrong-state", 409, "Not possible in this state";
    /// The device cannot be added, removed or changed in this way while the guest runs.
    HotplugUnsupported = "hotplug-unsupported", 409, "Not possible while the guest runs";
    /// The thing is in use by someone else (a tap, an image lock).
    InUse = "in-use", 409, "In use";
    /// Devices did not complete what they have in flight in time; the VM goes on as it was.
    StillBusy = "still-busy", 409, "Devices are still busy";
    /// The body is larger than the server accepts.
    BodyTooLarge = "body-too-large", 413, "Body too large";
    /// The request target is longer than the server accepts.
    UriTooLong = "uri-too-long", 414, "Request target too long";
    /// The body is not labelled as JSON.
    UnsupportedMediaType = "unsupported-media-type", 415, "Unsupported media type";
    /// A field has the wrong type, is unknown, missing or given twice.
    InvalidContent = "invalid-content", 422, "The document does not fit the schema";
    /// A value is outside its range or breaks a rule of its field.
    InvalidValue = "invalid-value", 422, "Invalid value";
    /// Two things that must differ are the same (ids, MAC addresses, slots, writable paths).
    Duplicate = "duplicate", 422, "Given twice";
    /// More devices than the bus has slots.
    NoFreeSlot = "no-free-slot", 422, "No free PCI slot";
    /// The configuration names nothing to boot from.
    BootSourceMissing = "boot-source-missing", 422, "Nothing to boot from";
    /// The kernel, initrd or firmware image cannot be used.
    BadImage = "bad-image", 422, "The image cannot be booted";
    /// A file, device or interface that the configuration names cannot be opened or used.
    Unusable = "unusable", 422, "A host resource cannot be used";
    /// The header section is larger than the server accepts.
    HeadersTooLarge = "headers-too-large", 431, "Request headers too large";
    /// Something failed inside the VMM.
    Internal = "internal", 500, "Internal error";
    /// The controller dropped the request without an answer.
    NoAnswer = "no-answer", 500, "The request was not answered";
    /// The guest does not support, or did not react to, what was asked.
    Unsupported = "unsupported", 501, "Not supported";
    /// The server serves as many connections as it may.
    TooManyConnections = "too-many-connections", 503, "Too many connections";
    /// The process is ending.
    ShuttingDown = "shutting-down", 503, "Shutting down";
    /// The host has too little memory, descriptors or processes.
    OutOfResources = "out-of-resources", 503, "The host is out of resources";
    /// The controller did not answer in time.
    ControlTimeout = "control-timeout", 504, "The VM did not answer in time";
}

impl Code {
    /// The code with this text, [`Code::Other`] if this build knows none.
    pub fn from_text(text: &str) -> Code {
        Code::ALL.iter().copied().find(|code| code.as_str() == text).unwrap_or(Code::Other)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Code::from_text(&Cow::<'de, str>::deserialize(deserializer)?))
    }
}

impl PartialSchema for Code {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .enum_values(Some(Code::ALL.iter().map(|code| code.as_str())))
            .description(Some(
                "What went wrong, stable for programs. Clients must expect codes that later versions add.",
            ))
            .into()
    }
}

impl ToSchema for Code {
    fn name() -> Cow<'static, str> {
        "ProblemCode".into()
    }
}

/// An error as the API tells it (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URI that names the kind of problem: `urn:rackvisor:problem:` and the code.
    #[serde(rename = "type")]
    #[schema(value_type = String, format = "uri")]
    pub kind: Box<str>,
    /// The kind of problem in words.
    #[schema(value_type = String)]
    pub title: Box<str>,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, naming the object.
    pub detail: String,
    /// The kind of problem, for programs.
    pub code: Code,
    /// JSON pointer (RFC 6901) of the offending field of the request body or configuration file; the empty pointer is
    /// the whole document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
    /// What to do about it.
    pub remedy: String,
}

impl Problem {
    /// A problem with this code; status and title follow from it.
    pub fn new(code: Code, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            kind: format!("{TYPE_PREFIX}{code}").into(),
            title: code.title().into(),
            status: code.status(),
            detail: detail.into(),
            code,
            pointer: None,
            remedy: remedy.into(),
        }
    }

    /// A field whose value is outside its range or breaks a rule (422 `invalid-value`).
    pub fn invalid(at: &Pointer, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Code::InvalidValue, detail, remedy).at(at)
    }

    /// The same problem, pointing at a field of the document.
    #[must_use]
    pub fn at(mut self, pointer: &Pointer) -> Self {
        self.pointer = Some(pointer.to_string());
        self
    }

    /// The answer when `id` names no disk.
    pub fn no_such_disk(id: &str) -> Self {
        Self::new(
            Code::NoSuchDisk,
            format!("the VM has no disk \"{id}\""),
            "GET /v1/vm/disks (rackctl disk list) lists the disks",
        )
    }

    /// The answer when `id` names no group of disks.
    pub fn no_such_disk_group(id: &str) -> Self {
        Self::new(
            Code::NoSuchDiskGroup,
            format!("the VM has no group of disks \"{id}\""),
            "GET /v1/vm/disk-groups (rackctl group list) lists them; PUT /v1/vm defines them",
        )
    }

    /// The answer when something needs a guest and there is none.
    pub fn no_guest(what: &str) -> Self {
        Self::new(Code::WrongState, format!("there is no guest: {what} is not possible"), "boot the VM first")
    }

    /// The answer when `id` names no NIC.
    pub fn no_such_nic(id: &str) -> Self {
        Self::new(
            Code::NoSuchNic,
            format!("the VM has no NIC \"{id}\""),
            "GET /v1/vm/nics (rackctl nic list) lists the NICs",
        )
    }

    /// The answer when no VM is defined.
    pub fn vm_undefined() -> Self {
        Self::new(
            Code::VmUndefined,
            "no VM is defined in this process",
            "define one with PUT /v1/vm (rackctl define FILE)",
        )
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.detail)?;
        if let Some(pointer) = self.pointer.as_deref().filter(|pointer| !pointer.is_empty()) {
            write!(f, " (at {pointer})")?;
        }
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        write!(f, " [{}]", self.code)
    }
}

impl std::error::Error for Problem {}

/// A JSON pointer (RFC 6901), built from the root down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pointer(String);

impl Pointer {
    /// The whole document.
    pub fn root() -> Self {
        Self::default()
    }

    /// The member `name` of the object here.
    #[must_use]
    pub fn key(&self, name: &str) -> Self {
        Self(format!("{}/{}", self.0, name.replace('~', "~0").replace('/', "~1")))
    }

    /// The element `index` of the array here.
    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        Self(format!("{}/{index}", self.0))
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&serde_path_to_error::Path> for Pointer {
    fn from(path: &serde_path_to_error::Path) -> Self {
        use serde_path_to_error::Segment;
        path.iter().fold(Pointer::root(), |at, segment| match segment {
            Segment::Seq { index } => at.index(*index),
            Segment::Map { key } => at.key(key),
            Segment::Enum { variant } => at.key(variant),
            Segment::Unknown => at,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_code_has_its_own_kebab_case_text_and_an_error_status() {
        let mut seen = HashSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code} twice");
            assert!(code.as_str().chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{code}");
            assert!((400..600).contains(&code.status()), "{code}");
            assert_eq!(Code::from_text(code.as_str()), *code);
        }
    }

    #[test]
    fn a_problem_survives_json_and_an_unknown_code_is_readable() {
        let problem = Problem::invalid(&Pointer::root().key("disks").index(0).key("a/b~c"), "what", "do");
        let text = serde_json::to_string(&problem).unwrap();
        assert!(text.contains("\"type\":\"urn:rackvisor:problem:invalid-value\""), "{text}");
        assert!(text.contains("\"pointer\":\"/disks/0/a~1b~0c\""), "{text}");
        assert_eq!(serde_json::from_str::<Problem>(&text).unwrap(), problem);
        let newer = text.replace("\"invalid-value\"", "\"from-the-future\"");
        assert_eq!(serde_json::from_str::<Problem>(&newer).unwrap().code, Code::Other);
    }
}
