//! What the VMs of a dataplane bring along, as JSON that `vnetctl run` and `up` write to a descriptor.
//!
//! A policy's text and its rules would not fit a command line, and would be seen in it.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::{OwnList, OwnPolicy};

/// The document. Everything may be left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmSettings {
    /// A policy of their own.
    pub own_policy: Option<OwnPolicySettings>,
    /// A mode of their own, as `ask`.
    pub mode: Option<String>,
    /// How long their resolver waits, in milliseconds.
    pub resolver_patience_ms: Option<u64>,
    /// Labels beside those of `--label`.
    pub labels: BTreeMap<String, String>,
}

/// A policy that VMs bring along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OwnPolicySettings {
    /// The YAML document, if there is one; never empty.
    pub document: Option<String>,
    /// Where it came from, for messages.
    pub source: String,
    /// Rules placed before the document's, as `allow tcp 10.0.0.1:80`.
    pub rules: Vec<String>,
    /// The lists that the document names.
    pub lists: Vec<OwnListSettings>,
}

/// A list that a policy names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OwnListSettings {
    /// Its path, as the document writes it.
    pub path: String,
    /// Its content's SHA-256, as hexadecimal digits.
    pub sha256: String,
    /// Its content, compressed and in base64.
    #[serde(with = "base64_text")]
    pub content: Vec<u8>,
    /// Bytes of its content.
    pub size_bytes: u64,
}

/// Bytes as text of JSON.
pub(crate) mod base64_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD
            .decode(String::deserialize(deserializer)?)
            .map_err(D::Error::custom)
    }
}

impl From<OwnPolicySettings> for OwnPolicy {
    fn from(settings: OwnPolicySettings) -> Self {
        Self {
            document: settings.document,
            source: settings.source,
            rules: settings.rules,
            lists: settings.lists.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<OwnListSettings> for OwnList {
    fn from(settings: OwnListSettings) -> Self {
        Self {
            path: settings.path,
            sha256: settings.sha256,
            content: settings.content,
            size_bytes: settings.size_bytes,
        }
    }
}

/// Why the document cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read.
    #[error("the VM settings cannot be read")]
    Read(#[source] io::Error),
    /// It is longer than the limit.
    #[error("the VM settings are longer than {SETTINGS_BYTES_MAX} bytes")]
    TooLong,
    /// It is not the document.
    #[error("the VM settings are not understood")]
    Json(#[source] serde_json::Error),
}

impl VmSettings {
    /// Reads the document to its end.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(from: impl Read) -> Result<Self, SettingsError> {
        let mut text = Vec::new();
        from.take(SETTINGS_BYTES_MAX + 1)
            .read_to_end(&mut text)
            .map_err(SettingsError::Read)?;
        if text.len() as u64 > SETTINGS_BYTES_MAX {
            return Err(SettingsError::TooLong);
        }
        serde_json::from_slice(&text).map_err(SettingsError::Json)
    }

    pub(super) fn resolver_patience(&self) -> Option<Duration> {
        self.resolver_patience_ms.map(Duration::from_millis)
    }
}

/// The longest document. Each VM carries its policy in a Hello, which has a limit too.
const SETTINGS_BYTES_MAX: u64 = 64 << 20;
