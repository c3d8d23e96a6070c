//! `vm list|show|label|mode`: the inventory, and how each VM is treated.

use std::collections::HashMap;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::model::Mode;
use vnet_proto::v1;

use super::Context;
use super::select::{ListVmArgs, label};
use crate::client::{PAGE_SIZE, pages, unary};
use crate::failure::Failure;
use crate::output::{Row, text, words};

/// Verbs of `vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// List VMs by name
    #[command(after_help = "Examples:\n  vnetctl vm list\n  vnetctl vm list -l env=prod -o json")]
    List(ListVmArgs),
    /// Show one VM
    #[command(after_help = "Examples:\n  vnetctl vm show web")]
    Show(NameArgs),
    /// Set labels of a VM, or remove them
    #[command(
        after_help = "Examples:\n  vnetctl vm label web env=prod team=net\n  vnetctl vm label web env-"
    )]
    Label(LabelArgs),
    /// Change how a VM's undecided traffic is treated
    #[command(
        long_about = "Change how a VM's undecided traffic is treated.\n\n\
            enforce     the policy's default action holds\n\
            ask         a default deny becomes a pending request (secure mode)\n\
            observe     allow, and record what would have been denied\n\
            block       deny and cut all that the guest initiates; forwards live on\n\
            quarantine  like block, and forwards are cut too; sticks to the VM's name",
        after_help = "Examples:\n  vnetctl vm mode web ask\n  vnetctl vm mode web quarantine"
    )]
    Mode(ModeArgs),
}

/// Arguments of `vm show`.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The VM's name
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// Arguments of `vm label`.
#[derive(Debug, Args)]
pub struct LabelArgs {
    /// The VM's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// KEY=VALUE sets a label, KEY- removes it
    #[arg(value_name = "KEY=VALUE|KEY-", required = true, value_parser = label_change)]
    pub labels: Vec<(String, String)>,
}

/// Arguments of `vm mode`.
#[derive(Debug, Args)]
pub struct ModeArgs {
    /// The VM's name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// enforce, ask, observe, block or quarantine
    #[arg(value_name = "MODE")]
    pub mode: Mode,
}

impl VmCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(vms) => {
                let vms = pages(|page_token| {
                    let mut service = client.vms();
                    let request = v1::ListVmsRequest {
                        vms: vms.message(),
                        page_size: PAGE_SIZE,
                        page_token,
                        ..Default::default()
                    };
                    async move {
                        let page = service.list_vms(unary(request)).await?.into_inner();
                        Ok((page.vms, page.next_page_token))
                    }
                })
                .await?;
                context.output.list(&vms)
            }
            Self::Show(NameArgs { name }) => {
                let answer = client
                    .vms()
                    .get_vm(unary(v1::GetVmRequest { name }))
                    .await?
                    .into_inner();
                let vm = answer.vm.unwrap_or_default();
                let now = context.output.now();
                context.output.one(v1::Vm::NAME, &vm, || details(&vm, now))
            }
            Self::Label(LabelArgs { name, labels }) => {
                let labels: HashMap<String, String> = labels.into_iter().collect();
                let request = v1::UpdateVmRequest {
                    name,
                    labels,
                    ..Default::default()
                };
                let answer = client.vms().update_vm(unary(request)).await?.into_inner();
                context.output.done(UPDATED, &answer, || {
                    let vm = answer.vm.clone().unwrap_or_default();
                    let labels = text::or_none(words::labels(&vm.labels));
                    format!(
                        "{} has labels {labels}{}",
                        vm.name,
                        words::cut(answer.cut.as_ref())
                    )
                })
            }
            Self::Mode(ModeArgs { name, mode }) => {
                let mode = v1::Mode::from(mode).into();
                let request = v1::UpdateVmRequest {
                    name,
                    mode,
                    ..Default::default()
                };
                let answer = client.vms().update_vm(unary(request)).await?.into_inner();
                context.output.done(UPDATED, &answer, || {
                    let vm = answer.vm.clone().unwrap_or_default();
                    let mode = words::mode(vm.mode);
                    format!("{} is in mode {mode}{}", vm.name, words::cut(answer.cut.as_ref()))
                })
            }
        }
    }
}

impl Row for v1::Vm {
    const NAME: &'static str = "vnet.v1.Vm";
    const COLUMNS: &'static [&'static str] = &[
        "NAME",
        "STATE",
        "MODE",
        "POLICY",
        "ADDRESSES",
        "FLOWS",
        "PENDING",
        "AGE",
        "LABELS",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        vec![
            self.name.clone(),
            words::vm_state(self.state),
            words::mode(self.mode),
            text::or_none(self.policy.as_str()),
            text::or_none(self.addresses.join(",")),
            self.live_flows.to_string(),
            self.pending_requests.to_string(),
            text::age(now, self.attached_at.as_ref()),
            text::or_none(words::labels(&self.labels)),
        ]
    }
}

fn details(vm: &v1::Vm, now: SystemTime) -> Vec<(&'static str, String)> {
    vec![
        ("Name", vm.name.clone()),
        ("Labels", text::or_none(words::labels(&vm.labels))),
        ("State", words::vm_state(vm.state)),
        ("Mode", words::mode(vm.mode)),
        (
            "Policy",
            format!("{} (revision {})", text::or_none(vm.policy.as_str()), vm.revision),
        ),
        ("Dataplane", text::or_none(vm.dataplane.as_str())),
        ("Network", text::or_none(vm.network.as_str())),
        ("Transport", text::or_none(vm.transport.as_str())),
        ("Addresses", text::or_none(vm.addresses.join(", "))),
        ("Leased (DHCP)", text::or_none(vm.leased_address.as_str())),
        ("MAC (claimed)", text::or_none(vm.mac.as_str())),
        ("Host name (claimed)", text::or_none(vm.claimed_hostname.as_str())),
        (
            "Attached",
            format!("{} ago", text::age(now, vm.attached_at.as_ref())),
        ),
        ("Live flows", vm.live_flows.to_string()),
        ("Pending requests", vm.pending_requests.to_string()),
        ("Dropped frames", counts(&vm.dropped_frames)),
        ("Counters", counts(&vm.counters)),
    ]
}

/// Counts by name, in order.
fn counts(counts: &std::collections::HashMap<String, u64>) -> String {
    let mut counts: Vec<String> = counts.iter().map(|(what, n)| format!("{what}={n}")).collect();
    counts.sort();
    text::or_none(counts.join(", "))
}

fn label_change(text: &str) -> Result<(String, String), String> {
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() && !key.contains('=') => Ok((key.to_owned(), String::new())),
        _ => label(text)
            .map_err(|_| format!("{text:?} is not a label (expected KEY=VALUE, or KEY- to remove it)")),
    }
}

const UPDATED: &str = "vnet.v1.UpdateVmResponse";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailing_dash_removes_a_label() {
        assert_eq!(label_change("env-"), Ok(("env".to_owned(), String::new())));
        assert_eq!(label_change("env=a-"), Ok(("env".to_owned(), "a-".to_owned())));
        assert!(label_change("-").unwrap_err().contains("KEY- to remove"));
    }
}
