//! VM selectors: which VMs a grant, a rule or a list is about.
//!
//! As text: `web-1`, `web-*`, `role=agent,team=red`, `web-*,role=agent`, and `*` for every VM.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::model::Malformed;
use crate::v1;

/// Which VMs something applies to; all parts that are set must agree.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VmSelector {
    name: Option<String>,
    labels: BTreeMap<String, String>,
}

impl VmSelector {
    /// Every VM. Only a caller who said so gets here.
    pub fn all() -> Self {
        Self {
            name: None,
            labels: BTreeMap::new(),
        }
    }

    /// From a name pattern and labels; `None` when neither is given, so that "all" is never an accident.
    pub fn new(name: Option<String>, labels: BTreeMap<String, String>) -> Option<Self> {
        let name = name.filter(|n| !n.is_empty());
        (name.is_some() || !labels.is_empty()).then_some(Self { name, labels })
    }

    /// The VM of this name, or those of a name pattern.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: Some(name.into()),
            labels: BTreeMap::new(),
        }
    }

    /// The name or pattern, if one is set.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The labels that must be there.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.labels
    }

    /// Whether it is every VM.
    pub fn is_all(&self) -> bool {
        self.name.as_deref().is_none_or(|n| n == "*") && self.labels.is_empty()
    }

    /// Whether it selects a VM.
    pub fn matches(&self, name: &str, labels: &BTreeMap<String, String>) -> bool {
        self.name
            .as_deref()
            .is_none_or(|pattern| glob(pattern.as_bytes(), name.as_bytes()))
            && self
                .labels
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// `*` stands for any run of bytes. Linear in the text for each star: the last star alone is retried.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            retry = Some((p + 1, t));
            p += 1;
        } else if pattern.get(p) == Some(&text[t]) {
            p += 1;
            t += 1;
        } else if let Some((after, from)) = retry {
            retry = Some((after, from + 1));
            p = after;
            t = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

impl FromStr for VmSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut name = None;
        let mut labels = BTreeMap::new();
        for part in text.split(',').map(str::trim) {
            let expected = "(expected a VM's name, key=value, or both separated by commas)";
            match part.split_once('=') {
                _ if part.is_empty() => return Err(format!("{text:?} has an empty part {expected}")),
                Some(("", _)) => return Err(format!("label {part:?} has no key {expected}")),
                Some((key, value)) => {
                    if labels.insert(key.to_owned(), value.to_owned()).is_some() {
                        return Err(format!("label {key} is given twice in {text:?}"));
                    }
                }
                None if name.is_some() => return Err(format!("{text:?} has two names {expected}")),
                None => name = Some(part.to_owned()),
            }
        }
        if labels.is_empty() && name.as_deref() == Some("*") {
            return Ok(Self::all());
        }
        Ok(Self { name, labels })
    }
}

impl fmt::Display for VmSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            return f.write_str("*");
        }
        let mut separator = "";
        if let Some(name) = &self.name {
            f.write_str(name)?;
            separator = ",";
        }
        for (key, value) in &self.labels {
            write!(f, "{separator}{key}={value}")?;
            separator = ",";
        }
        Ok(())
    }
}

impl TryFrom<v1::VmSelector> for VmSelector {
    type Error = Malformed;

    fn try_from(message: v1::VmSelector) -> Result<Self, Malformed> {
        let labels: BTreeMap<String, String> = message.labels.into_iter().collect();
        if labels.keys().any(String::is_empty) {
            return Err(Malformed::Mismatch {
                field: "selector.labels",
            });
        }
        if message.all && (!message.name.is_empty() || !labels.is_empty()) {
            return Err(Malformed::Mismatch {
                field: "selector.all",
            });
        }
        match Self::new(Some(message.name), labels) {
            Some(selector) => Ok(selector),
            None if message.all => Ok(Self::all()),
            None => Err(Malformed::Text {
                field: "selector",
                text: "it selects nothing (expected a VM's name, labels, or all)".to_owned(),
            }),
        }
    }
}

impl From<&VmSelector> for v1::VmSelector {
    fn from(selector: &VmSelector) -> Self {
        Self {
            name: selector.name.clone().unwrap_or_default(),
            labels: selector.labels.clone().into_iter().collect(),
            all: selector.name.is_none() && selector.labels.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn all_parts_that_are_set_must_agree() {
        let selector: VmSelector = "web-*,role=agent".parse().unwrap();
        assert!(selector.matches("web-1", &labels(&[("role", "agent"), ("team", "red")])));
        assert!(!selector.matches("web-1", &labels(&[("role", "build")])));
        assert!(!selector.matches("db-1", &labels(&[("role", "agent")])));
        assert!(VmSelector::all().matches("anything", &labels(&[])));
    }

    #[test]
    fn stars_stand_for_any_run_and_nothing_else_does() {
        for (pattern, text, fits) in [
            ("a*", "a", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("a", "ab", false),
            ("a?", "ab", false),
            ("**", "", true),
            ("a.c", "abc", false),
        ] {
            assert_eq!(
                glob(pattern.as_bytes(), text.as_bytes()),
                fits,
                "{pattern} {text}"
            );
        }
    }

    #[test]
    fn text_and_wire_keep_what_was_meant() {
        for text in ["web-1", "web-*", "role=agent,team=red", "web-*,role=agent", "*"] {
            let selector: VmSelector = text.parse().unwrap();
            assert_eq!(selector.to_string(), text);
            assert_eq!(
                VmSelector::try_from(v1::VmSelector::from(&selector)).unwrap(),
                selector
            );
        }
        for bad in ["", "a,b", "=x", "a,", "k=1,k=2"] {
            assert!(bad.parse::<VmSelector>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn an_empty_selector_is_never_all_by_accident() {
        assert!(VmSelector::try_from(v1::VmSelector::default()).is_err());
        let both = v1::VmSelector {
            name: "a".into(),
            all: true,
            ..Default::default()
        };
        assert!(VmSelector::try_from(both).is_err());
        assert!(VmSelector::new(Some(String::new()), BTreeMap::new()).is_none());
    }
}
