// Words show their heat map while the pointer is over them or the keyboard is at them; a click keeps it.
function showAttention(figure, words) {
  let kept = null;
  const heats = [...figure.querySelectorAll(".heat")];
  const show = (i) => heats.forEach((heat, j) => { heat.hidden = i !== j; });
  words.forEach((word, i) => {
    word.setAttribute("aria-pressed", "false");
    for (const event of ["pointerenter", "focus"]) word.addEventListener(event, () => show(i));
    for (const event of ["pointerleave", "blur"]) word.addEventListener(event, () => show(kept));
    word.addEventListener("click", () => {
      kept = kept === i ? null : i;
      words.forEach((other, j) => other.setAttribute("aria-pressed", String(kept === j)));
      show(kept ?? i);
    });
  });
}
