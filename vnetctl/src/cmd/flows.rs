//! `flows list|close`: live connections, associations and echo sessions.

use std::time::SystemTime;

use clap::{Args, Subcommand};
use vnet_proto::v1;

use super::Context;
use super::pending::names_of;
use super::select::ListVmArgs;
use crate::client::{PAGE_SIZE, pages, unary};
use crate::failure::Failure;
use crate::output::{Row, text, words};

/// Verbs of `flows`.
#[derive(Debug, Subcommand)]
pub enum FlowsCommand {
    /// List live flows, newest first
    #[command(after_help = "Examples:\n  vnetctl flows list\n  vnetctl flows list --vm web -o json")]
    List(ListVmArgs),
    /// Close live flows: both sides see a reset, the verdict stays
    #[command(
        after_help = "Examples:\n  vnetctl flows close \"$(vnetctl flows list -o json | jq -r '.[0].id')\""
    )]
    Close(CloseArgs),
}

/// Arguments of `flows close`.
#[derive(Debug, Args)]
pub struct CloseArgs {
    /// Ids, or their beginnings of at least four characters
    #[arg(value_name = "ID", required = true)]
    pub ids: Vec<String>,
}

impl FlowsCommand {
    /// Runs it.
    ///
    /// # Errors
    /// What the controlplane refuses.
    pub async fn execute(self, context: &mut Context) -> Result<(), Failure> {
        let client = context.connection.open().await?;
        match self {
            Self::List(vms) => {
                let flows = pages(|page_token| {
                    let mut service = client.flows();
                    let request = v1::ListFlowsRequest {
                        vms: vms.message(),
                        page_size: PAGE_SIZE,
                        page_token,
                        ..Default::default()
                    };
                    async move {
                        let page = service.list_flows(unary(request)).await?.into_inner();
                        Ok((page.flows, page.next_page_token))
                    }
                })
                .await?;
                context.output.list(&flows)
            }
            Self::Close(CloseArgs { ids }) => {
                super::each(ids, async |id| {
                    let request = v1::CloseFlowRequest { id };
                    let answer = client.flows().close_flow(unary(request)).await?.into_inner();
                    context.output.done("vnet.v1.CloseFlowResponse", &answer, || {
                        let flow = answer.flow.clone().unwrap_or_default();
                        format!(
                            "closed {} of {} (flow {}){}",
                            words::of_vm(words::far_end(flow.tuple.as_ref()), &flow.peer_vm),
                            flow.vm,
                            flow.id,
                            words::cut(answer.cut.as_ref())
                        )
                    })
                })
                .await
            }
        }
    }
}

impl Row for v1::Flow {
    const NAME: &'static str = "vnet.v1.Flow";
    const COLUMNS: &'static [&'static str] = &[
        "ID",
        "VM",
        "DIRECTION",
        "GUEST",
        "PEER",
        "NAMES",
        "UP",
        "DOWN",
        "AGE",
        "BY",
    ];

    fn cells(&self, now: SystemTime) -> Vec<String> {
        let by = words::reason_short(self.reason.as_ref());
        vec![
            self.id.clone(),
            self.vm.clone(),
            words::direction(self.direction),
            words::near_end(self.tuple.as_ref()),
            words::of_vm(words::far_end(self.tuple.as_ref()), &self.peer_vm),
            text::or_none(names_of(&self.names)),
            text::bytes(self.bytes_up),
            text::bytes(self.bytes_down),
            text::age(now, self.opened_at.as_ref()),
            if self.would_deny {
                format!("{by} (would deny)")
            } else {
                by
            },
        ]
    }
}
