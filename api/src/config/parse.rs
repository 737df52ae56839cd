//! Reading documents strictly, with the place of the mistake.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::error::Category;

use super::VmConfig;
use crate::problem::{Code, Pointer, Problem};

/// The most bytes of a configuration file.
const MAX_FILE: u64 = 1 << 20;

/// Reads one JSON document into `T`, the whole of it.
///
/// # Errors
/// `malformed-body` (400) if it is not JSON; `invalid-content` (422), with the pointer of the field, if it is JSON of
/// another shape.
pub fn json<T: DeserializeOwned + Serialize>(document: &[u8]) -> Result<T, Problem> {
    let read = serde_json::from_slice(document).map_err(|error| json_problem(&error))?;
    let mut deserializer = serde_json::Deserializer::from_slice(document);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let at = Pointer::from(error.path());
        content_problem(&error.into_inner(), &at)
    })?;
    same_shape(&read, &value)?;
    Ok(value)
}

/// Refuses an array where an object is meant. Serde reads a struct from either, so `"cpus": []`
/// would pass.
fn same_shape<T: Serialize>(read: &Value, meant: &T) -> Result<(), Problem> {
    let meant = serde_json::to_value(meant).map_err(|error| {
        let detail = format!("the document cannot be written again: {error}");
        Problem::new(Code::Internal, detail, "report this as a bug")
    })?;
    compare(read, &meant, &Pointer::root())
}

fn compare(read: &Value, meant: &Value, at: &Pointer) -> Result<(), Problem> {
    match (read, meant) {
        (Value::Object(read), Value::Object(meant)) => read
            .iter()
            .filter_map(|(key, read)| Some((key, read, meant.get(key)?)))
            .try_for_each(|(key, read, meant)| compare(read, meant, &at.key(key))),
        (Value::Array(read), Value::Array(meant)) => read
            .iter()
            .zip(meant)
            .enumerate()
            .try_for_each(|(index, (read, meant))| compare(read, meant, &at.index(index))),
        (Value::Array(_), Value::Object(_)) => Err(content_problem(&"invalid type: array, expected an object", at)),
        _ => Ok(()),
    }
}

fn json_problem(error: &serde_json::Error) -> Problem {
    let (what, remedy) = match error.classify() {
        Category::Eof => ("the document ends too early", "send one complete JSON document"),
        _ => ("the document is not JSON", "send one JSON document in UTF-8"),
    };
    Problem::new(Code::MalformedBody, format!("{what}: {error}"), remedy)
}

fn content_problem(error: &dyn std::fmt::Display, at: &Pointer) -> Problem {
    let mut detail = error.to_string();
    if detail.len() > 512 {
        // The message quotes what the client sent, which may be long.
        let end = (0..=512).rev().find(|end| detail.is_char_boundary(*end)).unwrap_or(0);
        detail.truncate(end);
        detail.push('…');
    }
    Problem::new(Code::InvalidContent, detail, "GET /v1/openapi.json has the schema").at(at)
}

impl VmConfig {
    /// Reads and validates a configuration in JSON.
    ///
    /// # Errors
    /// `malformed-body`, `invalid-content`, or what [`VmConfig::validate`] finds.
    pub fn from_json(document: &[u8]) -> Result<Self, Problem> {
        let config: Self = json(document)?;
        config.validate()?;
        Ok(config)
    }

    /// Reads and validates a configuration in TOML.
    ///
    /// # Errors
    /// `malformed-body`, `invalid-content`, or what [`VmConfig::validate`] finds.
    pub fn from_toml(document: &str) -> Result<Self, Problem> {
        let deserializer = toml::Deserializer::parse(document).map_err(|error| {
            Problem::new(Code::MalformedBody, format!("the document is not TOML: {error}"), "correct the syntax")
        })?;
        let config: Self = serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let at = Pointer::from(error.path());
            content_problem(&error.into_inner().message(), &at)
        })?;
        let read: Value =
            toml::from_str(document).map_err(|error| content_problem(&error.message(), &Pointer::root()))?;
        same_shape(&read, &config)?;
        config.validate()?;
        Ok(config)
    }

    /// Reads and validates a configuration file: TOML if its name ends in `.toml`, else JSON.
    ///
    /// # Errors
    /// `unusable` if the file cannot be read or has more than 1 MiB; else as [`VmConfig::from_json`]. The detail
    /// names the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Problem> {
        let path = path.as_ref();
        let bytes = read_bounded(path).map_err(|error| {
            Problem::new(
                Code::Unusable,
                format!("cannot read configuration file {}: {error}", path.display()),
                "check the path and its permissions",
            )
        })?;
        let config = if path.extension().is_some_and(|extension| extension == "toml") {
            match std::str::from_utf8(&bytes) {
                Ok(text) => Self::from_toml(text),
                Err(error) => Err(Problem::new(Code::MalformedBody, error.to_string(), "save the file as UTF-8")),
            }
        } else {
            Self::from_json(&bytes)
        };
        config.map_err(|mut problem| {
            problem.detail = format!("{}: {}", path.display(), problem.detail);
            problem
        })
    }
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "more than 1 MiB is no configuration"));
    }
    Ok(bytes)
}
