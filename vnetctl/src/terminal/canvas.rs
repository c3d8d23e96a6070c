//! The screen of a program that takes the whole of it, and vnet's own row below.
//!
//! The program's output goes into a terminal that exists in memory only (the crate `vt100`), one row less high than
//! the real one. What the user sees is drawn from there. So whatever the program writes, nothing of it is ever
//! drawn in the last row, and nothing else of it reaches the real terminal.

use std::fmt::Write as _;
use std::num::NonZeroU16;
use std::panic::{AssertUnwindSafe, catch_unwind};

use vt100::Screen;

use super::output::Size;

/// Fewer rows cannot spare one.
pub(crate) const ROWS_MIN: u16 = 4;
/// In fewer columns nothing could be told.
pub(crate) const COLUMNS_MIN: u16 = 20;

/// A screen and the row below it.
pub(crate) struct Canvas {
    size: Size,
    model: vt100::Parser,
    /// As it was last drawn.
    drawn: Screen,
    row: String,
    /// The row is to be drawn.
    changed: bool,
    /// A question covers the lower part.
    covered: bool,
    /// Which of the program's character sets draw lines: G0, G1.
    lines: [bool; 2],
    /// The second of them is used.
    shifted: bool,
    /// Fed, and not taken yet: one read at most.
    pending: String,
}

impl Canvas {
    /// An empty one for a terminal of this size.
    pub(super) fn new(size: Size) -> Canvas {
        let model = model(size);
        let drawn = model.screen().clone();
        Canvas {
            size,
            model,
            drawn,
            row: String::new(),
            changed: true,
            covered: false,
            lines: [false; 2],
            shifted: false,
            pending: String::new(),
        }
    }

    /// Takes output of the program's, of what [`Filter`](super::output::Filter) lets pass: a character, or a
    /// sequence.
    pub(super) fn feed(&mut self, text: &str) {
        if self.lines[usize::from(self.shifted)] && text.len() == 1 {
            self.pending.extend(text.chars().map(line_drawing));
        } else {
            self.pending.push_str(text);
        }
    }

    /// Has the model take what was fed.
    fn take(&mut self) {
        let text = std::mem::take(&mut self.pending);
        // A mistake in the model costs the program its screen, and nobody else anything.
        let taken = catch_unwind(AssertUnwindSafe(|| self.model.process(text.as_bytes())));
        if taken.is_err() {
            self.model = model(self.size);
        }
    }

    /// Which set draws lines (`ESC ( 0`).
    pub(super) fn line_drawing(&mut self, set: u8, on: bool) {
        self.lines[usize::from(set == b')')] = on;
    }

    /// Which set is used: G1, or G0.
    pub(super) fn shift(&mut self, on: bool) {
        self.shifted = on;
    }

    /// Where the cursor is, row and column from 0.
    pub(super) fn cursor(&mut self) -> (u16, u16) {
        self.take();
        self.model.screen().cursor_position()
    }

    /// The terminal has another size.
    pub(super) fn resize(&mut self, size: Size) {
        self.take();
        self.size = size;
        let (rows, columns) = model_size(size);
        let resized = catch_unwind(AssertUnwindSafe(|| self.model.set_size(rows, columns)));
        if resized.is_err() {
            self.model = model(size);
        }
    }

    /// What is in the row below the program's screen: one line of plain text.
    pub(crate) fn set_row(&mut self, row: &str) {
        if self.row != row {
            self.row = row.to_owned();
            self.changed = true;
        }
    }

    /// Draws what has changed.
    pub(crate) fn draw(&mut self, shown: &mut String) {
        self.take();
        if self.covered {
            return;
        }
        let screen = self.model.screen().clone();
        shown.push_str(&screen.contents_diff(&self.drawn));
        self.drawn = screen;
        if std::mem::take(&mut self.changed) {
            self.draw_row(shown);
        }
    }

    /// Draws all of it, a question that covered it gone.
    pub(crate) fn redraw(&mut self) -> String {
        self.take();
        self.covered = false;
        let screen = self.model.screen().clone();
        let mut shown = screen.contents_formatted();
        self.drawn = screen;
        self.changed = false;
        self.draw_row(&mut shown);
        shown
    }

    fn draw_row(&self, shown: &mut String) {
        let (rows, columns) = self.size;
        // The last column is left free: some terminals would scroll.
        let width = usize::from(columns.saturating_sub(1));
        let text: String = ascii(&self.row).chars().take(width).collect();
        let _ = write!(shown, "\x1b[{rows};1H\x1b[0m\x1b[2K\x1b[7m{text:width$}\x1b[0m");
        shown.push_str(&self.drawn.attributes_formatted());
        shown.push_str(&self.drawn.cursor_state_formatted());
    }

    /// Lays a question over the lower rows; nothing is drawn until [`redraw`](Self::redraw). `None` if not all of
    /// it would be seen.
    pub(crate) fn cover(&mut self, question: &str) -> Option<String> {
        let (rows, columns) = self.size;
        let width = usize::from(columns.saturating_sub(1)).max(1);
        let text: Vec<char> = ascii(question).chars().collect();
        let lines: Vec<String> = text.chunks(width).map(|line| line.iter().collect()).collect();
        let height = u16::try_from(lines.len()).ok().filter(|height| *height <= rows)?;
        let mut shown = String::new();
        for (at, line) in (rows - height + 1..).zip(&lines) {
            let _ = write!(shown, "\x1b[{at};1H\x1b[0m\x1b[2K\x1b[7m{line:width$}");
        }
        let end = lines.last().map_or(0, |line| line.chars().count()) + 1;
        let _ = write!(shown, "\x1b[0m\x1b[{rows};{}H\x1b[?25h", end.min(width));
        self.covered = true;
        Some(shown)
    }
}

/// Every character one column wide, whatever the terminal thinks of widths.
fn ascii(text: &str) -> String {
    text.chars()
        .flat_map(|character| match character {
            ' '..='~' => vec![character],
            other => other.escape_unicode().collect(),
        })
        .collect()
}

fn model(size: Size) -> vt100::Parser {
    let (rows, columns) = model_size(size);
    vt100::Parser::new(rows, columns, 0)
}

fn model_size((rows, columns): Size) -> (NonZeroU16, NonZeroU16) {
    let at_least_one = |number| NonZeroU16::new(number).unwrap_or(NonZeroU16::MIN);
    (at_least_one(rows.saturating_sub(1)), at_least_one(columns))
}

/// DEC's special graphics, VT100 User Guide table 3-9.
fn line_drawing(character: char) -> char {
    const FROM: &str = "`afgjklmnopqrstuvwxyz{|}~";
    const TO: &str = "◆▒°±┘┐┌└┼⎺⎻─⎼⎽├┤┴┬│≤≥π≠£·";
    FROM.chars()
        .position(|from| from == character)
        .and_then(|at| TO.chars().nth(at))
        .unwrap_or(character)
}
