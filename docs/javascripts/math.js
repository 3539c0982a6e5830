// Formulas are shown as TeX source in a code-like block where no renderer is loaded; nothing is fetched from elsewhere.
document.querySelectorAll(".arithmatex").forEach((node) => node.classList.add("highlight"));
