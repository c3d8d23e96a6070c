//! A policy document as checked data, and what is said of one that does not check.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vnet_proto::model::{Mode, VmSelector};

use crate::grant::VmView;
use crate::policy::resolvers::Resolvers;
use crate::policy::{ForwardRule, NameGuards, NameSet, PolicyTest, Profile, RuleList, Settings};

/// What is done where nothing else answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DefaultAction {
    /// Lets through.
    Allow,
    /// Refuses.
    Deny,
}

impl fmt::Display for DefaultAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// What lookups that are let through are answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum DnsAnswer {
    /// What the upstream says.
    #[default]
    Real,
    /// An address of its own for each name; what it stands for is looked up when a connection is allowed.
    Synthetic,
}

impl fmt::Display for DnsAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Real => "real",
            Self::Synthetic => "synthetic",
        })
    }
}

/// The `dns:` part of a policy.
#[derive(Debug, Clone, Default)]
pub struct DnsPolicy {
    /// As written; `None`: omitted.
    pub default_action: Option<DefaultAction>,
    /// Names whose lookups and bound addresses are allowed.
    pub allowed: Arc<NameSet>,
    /// Names that are refused before anything else.
    pub blocked: Arc<NameSet>,
    /// What lookups are answered with.
    pub answer: DnsAnswer,
}

/// A policy document, checked whole.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// As written; `None`: omitted, which is deny.
    pub default_action: Option<DefaultAction>,
    /// As written, by its own key or an alias.
    pub mode: Option<Mode>,
    /// Rules, in order.
    pub rules: Arc<RuleList>,
    /// What VMs may open on the host by themselves, in order.
    pub forwards: Vec<Arc<ForwardRule>>,
    /// The `dns:` part; `None`: there is none.
    pub dns: Option<DnsPolicy>,
    /// How strictly flows are read that rest on a name.
    pub name_guards: NameGuards,
    /// How long a packet is held; `None`: omitted.
    pub approval_timeout: Option<Duration>,
    /// Whether it says `version: 1`; without, and without `dns:`, it is of the draft's form.
    pub versioned: bool,
    /// Which VMs it claims; `None`: none by itself.
    pub applies_to: Option<VmSelector>,
    /// What it says beside its rules.
    pub settings: Settings,
    /// Settings for some VMs, before its own; the first that matches.
    pub profiles: Vec<Profile>,
    /// What it knows of DNS servers.
    pub(crate) resolvers: Arc<Resolvers>,
    /// What its author expects of it.
    pub tests: Vec<PolicyTest>,
    /// What a reader should know of it.
    pub warnings: Vec<PolicyWarning>,
}

impl Policy {
    /// The profile that is for a VM.
    pub fn profile_of(&self, vm: &VmView) -> Option<&Profile> {
        self.profiles.iter().find(|p| p.vms.matches(&vm.name, &vm.labels))
    }

    /// The mode that it says for a VM.
    pub fn mode_of(&self, vm: &VmView) -> Option<Mode> {
        self.profile_of(vm).and_then(|profile| profile.mode).or(self.mode)
    }

    /// Whether lookups stay open although nothing says so (the form of gvproxy's draft).
    pub fn leaves_lookups_open(&self) -> bool {
        self.dns.is_none() && !self.versioned
    }
}

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}:{line}:{column}: {text}")]
pub struct PolicyError {
    /// The file's path, or whatever else the document came from.
    pub source_name: String,
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// What was found, what was expected, and the remedy.
    pub text: String,
}

/// Everything that is wrong with a document; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyErrors(pub Vec<PolicyError>);

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for problem in &self.0 {
            write!(f, "{separator}{problem}")?;
            separator = "\n";
        }
        Ok(())
    }
}

impl std::error::Error for PolicyErrors {}

/// A finding that does not stop a policy from loading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyWarning {
    /// Line, from 1.
    pub line: u32,
    /// Column, from 1.
    pub column: u32,
    /// What was found and what to do.
    pub text: String,
}

impl fmt::Display for PolicyWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.text)
    }
}
